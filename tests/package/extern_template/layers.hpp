// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// An engine names its layer once. All of its C++ files know the type; one file compiles the layer.

#include <tessera/tessera.hpp>

namespace engine {

using router = tessera::router<tessera::score::sigmoid, tessera::select::top_k, tessera::weigh::normalized,
                               tessera::balance::bias>;
using experts = tessera::experts<tessera::activation::swiglu, tessera::precision::fp32>;

template <class Space>
using layer = tessera::moe_layer<router, experts, tessera::layout::block, tessera::comm::self<Space>>;

}  // namespace engine

#if !defined(ENGINE_FORGETS_EXTERN)
extern template class tessera::moe_layer<engine::router, engine::experts, tessera::layout::block,
                                         tessera::comm::self<ENGINE_SPACE>>;
#endif
