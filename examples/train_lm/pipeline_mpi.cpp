// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

/// @file
/// The pipelined trainer of ranks that are processes, instantiated once. One thread alone may use MPI, so the two lanes
/// of an overlapped pair run one after the other.

#include <memory>

#include <tessera/comm/mpi.hpp>
#include <tessera/pipeline/lanes.hpp>

#include "pipeline_trainer.hpp"

namespace train_lm {

template <>
std::unique_ptr<pipelined_run> make_pipelined_run(const settings& s, balance_kind balance, const corpus& text,
                                                  ts::comm::mpi& comm) {
  using trainer = pipeline_trainer<float, ts::comm::mpi, ts::pipeline::serial_lanes<ts::space::host>>;
  return std::make_unique<trainer>(s, balance, text, comm);
}

}  // namespace train_lm
