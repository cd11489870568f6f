// expect: the first argument must be an activation
// expect: activation::swiglu, geglu, geglu_tanh, clamped_swiglu, relu2, gelu
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A user's gated activation whose gradient is missing.

#include <tessera/experts/experts.hpp>

namespace ts = tessera;

struct bilinear {
  struct options {};
  static constexpr bool gated = true;
  template <class A>
  TESSERA_HD static A forward(A gate, A up, const options&) {
    return gate * up;
  }
#if !defined(TESSERA_EXPECT_FAILURE)
  template <class A>
  TESSERA_HD static void backward(A gate, A up, A dout, A& dgate, A& dup, const options&) {
    dgate = dout * up;
    dup = dout * gate;
  }
#endif
};

int main() {
  const ts::experts<bilinear, ts::precision::fp32> experts({.num_local_experts = 1, .hidden = 2, .intermediate = 3});
  return static_cast<int>(experts.up_width()) - 6;
}
