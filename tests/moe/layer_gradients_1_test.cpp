// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include "../support/pairwise_rows.hpp"

TEST_CASE("gradients equal central differences: rows 0 to 9 of the pairwise table") {
  tessera_test::pairwise::check_rows<0>(std::make_index_sequence<10>{});
}

namespace {

using namespace tessera_test::pairwise;

template <class F, std::size_t... I>
void for_each_index(F&& f, std::index_sequence<I...>) {
  (f(std::integral_constant<int, int(I)>{}), ...);
}

// Whether the choices `a` of factor `f` and `b` of factor `g` may stand together: some row-like router has both.
bool possible(std::size_t f, int a, std::size_t g, int b) {
  if (f > 3 || g > 3) return true;  // only router policies exclude each other
  bool found = false;
  for_each_index(
      [&](auto score) {
        for_each_index(
            [&](auto select) {
              for_each_index(
                  [&](auto weigh) {
                    for_each_index(
                        [&](auto balance) {
                          const std::array<int, 4> choice{score, select, weigh, balance};
                          if (choice[f] == a && choice[g] == b) found = found || fit<score, select, weigh, balance>;
                        },
                        std::make_index_sequence<6>{});
                  },
                  std::make_index_sequence<4>{});
            },
            std::make_index_sequence<5>{});
      },
      std::make_index_sequence<5>{});
  return found;
}

}  // namespace

TEST_CASE("every pair of compatible choices stands in a row of the table") {
  int pairs = 0;
  for (std::size_t f = 0; f < levels.size(); ++f) {
    for (std::size_t g = f + 1; g < levels.size(); ++g) {
      for (int a = 0; a < levels[f]; ++a) {
        for (int b = 0; b < levels[g]; ++b) {
          bool covered = false;
          for (const row& r : table) covered = covered || (indices(r)[f] == a && indices(r)[g] == b);
          CAPTURE(f);
          CAPTURE(a);
          CAPTURE(g);
          CAPTURE(b);
          CHECK(covered == possible(f, a, g, b));
          ++pairs;
        }
      }
    }
  }
  CHECK(pairs > 900);
}
