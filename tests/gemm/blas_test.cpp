// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Empty where the build found no CBLAS.
#if defined(TESSERA_HAS_CBLAS)

#include <doctest/doctest.h>

#include <vector>

#include <tessera/gemm/blas.hpp>

#include "gemm_case.hpp"

namespace {

namespace ts = tessera;
using namespace gemm_case;
using ts::gemm::blas;
using ts::gemm::group_operand;
using ts::gemm::reference;
using ts::gemm::row_operand;

static_assert(ts::gemm::host_gemm<blas>);

TEST_CASE_TEMPLATE("blas: products agree with plain loops in double", A, float, double) {
  random_engine random(11);
  for (int repeat = 0; repeat < 12; ++repeat)
    for (const order layout : orders)
      for (const ts::write mode : modes) {
        const auto size = [&] { return uniform(random, 0, 1) == 0 ? uniform(random, 0, 5) : uniform(random, 1, 70); };
        const auto offsets = random_offsets(random, uniform(random, 0, 4), 30);
        const bool gathered = uniform(random, 0, 1) == 0;
        check_variable_m<blas, A, A, A, A, A>(random, {offsets, 0, size(), size()}, layout, gathered,
                                              uniform(random, 0, 1) == 0, mode);
        check_variable_k<blas, A, A, A, A>(random, {offsets, size(), size(), 0}, layout, gathered, mode);
      }
}

TEST_CASE_TEMPLATE("blas: products larger than every block agree with plain loops in double", A, float, double) {
  random_engine random(12);
  for (const order layout : orders)
    for (const bool gathered : {false, true}) {
      check_variable_m<blas, A, A, A, A, A>(random, {offsets_of({150, 3}, 1), 0, 60, 530}, layout, gathered, true,
                                            ts::write::overwrite);
      check_variable_k<blas, A, A, A, A>(random, {offsets_of({150, 3}, 1), 523, 40, 0}, layout, gathered,
                                         ts::write::accumulate);
    }
}

// ts::bfloat16 in full: some CBLAS headers put a bfloat16 of their own into the global namespace.
TEST_CASE("blas: other element types have the bits of the reference") {
  random_engine random(13);
  const std::int64_t rows = 9, N = 20, K = 33;
  const auto x = normal<ts::bfloat16>(random, rows * K);
  const auto w = normal<ts::bfloat16>(random, N * K);
  std::vector<ts::bfloat16> mine(static_cast<std::size_t>(rows * N)), theirs(mine);
  std::vector<float> mine_k(static_cast<std::size_t>(K * K)), theirs_k(mine_k);
  const row_operand<ts::bfloat16> a{x.data(), K};
  const group_operand<const ts::bfloat16> b{w.data(), 0, K, 1};
  const auto offsets = offsets_of({rows});
  blas::variable_m<float>(offsets, N, K, a, b, nullptr, ts::matrix_view<ts::bfloat16>(mine.data(), rows, N));
  reference::variable_m<float>(offsets, N, K, a, b, nullptr, ts::matrix_view<ts::bfloat16>(theirs.data(), rows, N));
  CHECK(same_bits(mine.data(), theirs.data(), rows * N));
  blas::variable_k<float>(offsets, K, K, a, a, group_operand<float>{mine_k.data(), 0, K, 1}, ts::write::overwrite);
  reference::variable_k<float>(offsets, K, K, a, a, group_operand<float>{theirs_k.data(), 0, K, 1},
                               ts::write::overwrite);
  CHECK(same_bits(mine_k.data(), theirs_k.data(), K * K));
}

TEST_CASE("blas: one row repeated by a stride of zero") {
  const std::vector<float> x{1, 2, 3}, w{1, 1, 1, 2, 2, 2};
  std::vector<float> c(8);
  blas::variable_m<float>(offsets_of({4}), 2, 3, row_operand<float>{x.data(), 0},
                          group_operand<const float>{w.data(), 6, 3, 1}, nullptr,
                          ts::matrix_view<float>(c.data(), 4, 2));
  CHECK(c == std::vector<float>{6, 12, 6, 12, 6, 12, 6, 12});
}

}  // namespace

#endif
