// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The layer room: the mixture-of-experts layer and the layers of published models.

#include <tessera/moe/moe_layer.hpp>
#include <tessera/moe/presets.hpp>
#include <tessera/moe/saved_rows.hpp>
#include <tessera/moe/shape.hpp>
#include <tessera/moe/side_stream.hpp>
#include <tessera/moe/state.hpp>
#include <tessera/moe/weights.hpp>
