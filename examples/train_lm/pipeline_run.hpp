// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A pipelined run as main.cpp sees it: what stands behind it is compiled in pipeline_threads.cpp and pipeline_mpi.cpp.

#include <functional>
#include <memory>
#include <string>

#include "corpus.hpp"
#include "metrics.hpp"
#include "progress.hpp"
#include "settings.hpp"

namespace train_lm {

/// One training run of a pipelined model on one rank. All members are collective.
class pipelined_run {
 public:
  virtual ~pipelined_run() = default;
  /// Sizes of model and pipeline in two lines, for people.
  virtual std::string description() const = 0;
  /// The run from start to end. @param bar Shows it; only rank 0 has one. @param on_stop Called on rank 0 with what
  /// there is when the run has been stopped, before validation and sample: mpirun kills its processes a second later.
  virtual run_result run(progress* bar, const std::function<void(const run_result&)>& on_stop) = 0;
};

/// The run that `s` asks for. @param s Checked by `prepare_pipeline` and `validate`. @param comm Outlives the run, as
/// `text` does.
template <class Comm>
std::unique_ptr<pipelined_run> make_pipelined_run(const settings& s, balance_kind balance, const corpus& text,
                                                  Comm& comm);

}  // namespace train_lm
