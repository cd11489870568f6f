// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

/// @file
/// The pipelined trainer of ranks that are threads, instantiated once.

#include <memory>

#include <tessera/comm/threads.hpp>
#include <tessera/pipeline/lanes.hpp>

#include "pipeline_trainer.hpp"

namespace train_lm {

template class pipeline_trainer<float, ts::comm::threads, ts::pipeline::host_lanes>;

template <>
std::unique_ptr<pipelined_run> make_pipelined_run(const settings& s, balance_kind balance, const corpus& text,
                                                  ts::comm::threads& comm) {
  using trainer = pipeline_trainer<float, ts::comm::threads, ts::pipeline::host_lanes>;
  return std::make_unique<trainer>(s, balance, text, comm);
}

}  // namespace train_lm
