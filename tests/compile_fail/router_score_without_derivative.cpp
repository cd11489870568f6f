// expect: tessera::router: the first argument must be a score policy
// expect: score_has_derivative
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A user's score that forgets its derivative.

#include <tessera/router/router.hpp>

namespace ts = tessera;

struct linear {
  struct options {};
  static constexpr auto over = ts::score_over::each;
  template <class A>
  TESSERA_HD static A value(A logit, const options&) {
    return logit;
  }
#if !defined(TESSERA_EXPECT_FAILURE)
  template <class A>
  TESSERA_HD static A derivative(A, A, const options&) {
    return A(1);
  }
#endif
};

template class ts::router<linear>;

int main() { return 0; }
