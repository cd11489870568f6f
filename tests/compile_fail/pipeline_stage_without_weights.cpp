// expect: a stage needs a type element and members forward
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A stage of a pipeline whose backward has no part for the weights.

#include <cstdint>
#include <span>

#include <tessera/comm/self.hpp>
#include <tessera/pipeline/executor.hpp>

namespace ts = tessera;
namespace pl = tessera::pipeline;

struct my_stage {
  using element = float;
  void forward(ts::host_stream, const pl::work_item&, ts::matrix_view<const float>, ts::matrix_view<float>) {}
  void backward_input(ts::host_stream, const pl::work_item&, ts::matrix_view<const float>, ts::matrix_view<const float>,
                      ts::matrix_view<float>) {}
#if !defined(TESSERA_EXPECT_FAILURE)
  void backward_weights(ts::host_stream, const pl::work_item&, ts::matrix_view<const float>,
                        ts::matrix_view<const float>) {}
#endif
};

int main() {
  pl::schedule nothing;
  nothing.num_ranks = 1;
  nothing.actions.resize(1);
  ts::comm::self<ts::space::host> comm;
  pl::executor<ts::comm::self<ts::space::host>, float> runner(nothing, comm, {}, {});
  my_stage stage;
  my_stage* const stages[] = {&stage};
  runner.run({}, std::span<my_stage* const>(stages), std::span<const std::int64_t>());
  return 0;
}
