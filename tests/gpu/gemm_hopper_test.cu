// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Grouped products on sm_90a, all kernels of them. Without such a GPU it says so and exits with 77.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "../support/grouped_products.cuh"

namespace {

using namespace grouped_test;

struct hopper {
  using device = hp::device;
  using launch_options = hp::all_kernels_options;

  // All kernels, or the one that an epilogue with steps has, on several blocks and on one.
  static std::vector<hp::config> variants(bool all) {
    if (!all) return {{hp::schedule::cooperative, 128, 256, 1, 7}, {hp::schedule::cooperative, 128, 256, 1, 1}};
    return {{hp::schedule::cooperative, 128, 256, 1, 7},
            {hp::schedule::ping_pong, 128, 128, 1, 5},
            {hp::schedule::cooperative, 128, 256, 2, 6}};
  }
  static launch_options options(const hp::config& variant) {
    launch_options result;
    result.forced = &variant;
    return result;
  }
  static std::string describe(const hp::config& variant) { return hp::to_string(variant); }

  template <contiguous Order, gathered Rows, class... Arguments>
  static void variable_m(const Arguments&... arguments) {
    hp::variable_m<Order, Rows>(arguments...);
  }
  template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class... Arguments>
  static void variable_m_activation(const Arguments&... arguments) {
    hp::variable_m_activation<Order, Rows, Activation, Interleaved>(arguments...);
  }
  template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class... Arguments>
  static void variable_m_activation_backward(const Arguments&... arguments) {
    hp::variable_m_activation_backward<Order, Rows, Activation, Interleaved>(arguments...);
  }
  template <gathered Rows, class... Arguments>
  static void variable_k(const Arguments&... arguments) {
    hp::variable_k<Rows>(arguments...);
  }
};

}  // namespace

TEST_CASE("variable_m multiplies every group's rows, whatever the kernel") { check_multiplies<hopper>(); }

TEST_CASE("variable_m gathers rows") { check_gathers<hopper>(); }

TEST_CASE("the up-projection saves H and applies the activation") { check_up_projection<hopper>(); }

TEST_CASE("the activation's gradient takes the place of H") { check_gradient_in_place<hopper>(); }

TEST_CASE("variable_k sums over every group's rows, and empty groups get zeros") { check_weight_gradients<hopper>(); }

TEST_CASE("a row's bits depend neither on its neighbours nor on the order of tiles") { check_independence<hopper>(); }

TEST_CASE("a captured product is right when the rows have changed") { check_capture<hopper>(); }

TEST_CASE("what the kernels cannot do is refused with a sentence") { check_refusals<hopper>(); }

int main(int argc, char** argv) { return run_tests<hopper>(argc, argv); }
