// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace engine {

/// Notes that the test's device half was reached.
void record(const char* call);

}  // namespace engine
