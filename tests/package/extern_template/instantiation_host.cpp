// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The one file of the engine that compiles the layer for host memory.

#include "layers.hpp"

template class tessera::moe_layer<engine::router, engine::experts, tessera::layout::block,
                                  tessera::comm::self<tessera::space::host>>;
