// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Everything a run can be told, with its defaults.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <tessera/core/error.hpp>
#include <tessera/mesh/training_mesh.hpp>

#include "optimizer.hpp"

namespace train_lm {

namespace ts = tessera;

/// What keeps the experts' loads equal.
enum class balance_kind {
  none,  ///< Nothing.
  loss,  ///< The Switch Transformer's auxiliary loss.
  bias,  ///< A selection bias moved by the load after each step (DeepSeek-V3).
};

/// How the outputs of a token's experts are summed.
enum class combine_kind {
  ordered,  ///< In the order of k: the same bits for every rank count.
  reduced,  ///< On the owners first: fewer bytes travel.
};

/// Its name on the command line.
constexpr const char* name_of(balance_kind kind) {
  return kind == balance_kind::none ? "none" : kind == balance_kind::loss ? "loss" : "bias";
}
/// Its name on the command line.
constexpr const char* name_of(combine_kind kind) { return kind == combine_kind::ordered ? "ordered" : "reduced"; }

/// Chunks of a micro-batch: the unit in which gradients and losses are summed, so that any number of ranks gives the
/// same bits. 12 splits evenly over 1, 2, 3, 4, 6 and 12 ranks; other counts get unequal shares.
inline constexpr std::int64_t num_chunks = 12;

/// One run.
struct settings {
  std::vector<std::string> data;                           ///< Files or folders; empty: the Debian system's texts.
  std::vector<balance_kind> balances{balance_kind::bias};  ///< One training run each, in this order.
  combine_kind combine = combine_kind::ordered;            ///< See `combine_kind`.
  int ranks = 0;                                           ///< 0: the number of cores, at most 4.
  std::int64_t steps = 420;                                ///< Optimizer steps.
  std::int64_t batch = 24;                                 ///< Sequences of a step over all ranks.
  std::int64_t length = 128;                               ///< Bytes of a sequence.
  std::int64_t layers = 2;                                 ///< Blocks of mixer and experts.
  std::int64_t hidden = 128;                               ///< d.
  std::int64_t intermediate = 64;                          ///< n, width of one expert.
  std::int64_t experts = 32;                               ///< E per block.
  std::int64_t top_k = 4;                                  ///< K.
  double rate = 4e-3;                                      ///< Peak learning rate.
  double bias_rate = 0.01;                              ///< Step of the selection bias, cooled with the learning rate.
  double loss_coefficient = 0.01;                       ///< Of the auxiliary loss.
  std::uint64_t seed = 1;                               ///< Of the initial values and the sample.
  std::int64_t eval_every = 0;                          ///< Steps between validations; 0: only at the end.
  std::int64_t sample_bytes = 400;                      ///< Length of the sample.
  std::string prompt = "Permission is hereby granted";  ///< What the sample begins with.
  double temperature = 0.7;                             ///< Of the sample.
  std::string output = "train_lm_output";               ///< Folder for everything written.
  bool quiet = false;                                   ///< No progress, only results.
  bool plots = true;                                    ///< Draw with gnuplot.
  bool baselines = true;                                ///< Fit the order-2 model and run the compressor.
  std::string mesh;                                     ///< See `mesh_of`; empty: all ranks divide the experts.
  std::string checkpoint;                               ///< Folder of checkpoints; empty: none are saved.
  std::int64_t checkpoint_every = 50;                   ///< Steps between them; 0: one at the end.
  int keep = 3;                                         ///< Newest ones that are kept; 0: all.
  bool resume = false;                                  ///< Go on from the newest one, if there is one.
  std::string pipeline;                                 ///< Schedule of the pipeline; empty: none.
  int stages = 1;                                       ///< Stages that the layers are spread over.
  int micro_batches = 0;                                ///< Of a step; 0: as many as chunks.
  int mtp = 0;                                          ///< D, depths of multi-token prediction; 0: none.
  std::vector<double> mtp_weights{0.3, 0.1};            ///< See `lambda_of`.
  adamw_options adam;                                   ///< Coefficients of AdamW.
};

/// The mesh of a run. @throws tessera::error if it does not fit the ranks, or has an axis that this program lacks.
inline ts::training_mesh mesh_of(const settings& s) {
  const std::string ranks = std::to_string(s.ranks);
  const ts::training_mesh mesh =
      ts::training_mesh::parse(s.mesh.empty() ? "dp_shard=" + ranks + ",ep=" + ranks : s.mesh, s.ranks);
  TESSERA_EXPECTS(mesh.sizes.pp == 1 && mesh.sizes.cp == 1 && mesh.sizes.tp == 1,
                  "--mesh " << s.mesh << ": the axes are dp_replicate, dp_shard and ep");
  return mesh;
}

/// The axes that a run has, as --mesh reads them.
inline std::string name_of(const ts::training_mesh& mesh) {
  return "dp_replicate=" + std::to_string(mesh.sizes.dp_replicate) +
         ",dp_shard=" + std::to_string(mesh.sizes.dp_shard) + ",ep=" + std::to_string(mesh.sizes.ep);
}

/// Checks what the library cannot: the sizes of the example itself.
/// @throws tessera::error with the values and what would be right.
inline void validate(const settings& s) {
  const auto positive = [](std::int64_t value, const char* name) {
    TESSERA_EXPECTS(value > 0, name << " is " << value << ", it must be positive");
  };
  positive(s.steps, "--steps");
  positive(s.length, "--seq-len");
  positive(s.layers, "--layers");
  positive(s.hidden, "--hidden");
  positive(s.intermediate, "--intermediate");
  positive(s.experts, "--experts");
  positive(s.top_k, "--top-k");
  positive(s.batch, "--batch");
  TESSERA_EXPECTS(s.batch % num_chunks == 0, "--batch is " << s.batch << ", it must be a multiple of " << num_chunks
                                                           << ": gradients are summed in " << num_chunks
                                                           << " chunks of whole sequences");
  TESSERA_EXPECTS(s.top_k <= s.experts, "--top-k " << s.top_k << " exceeds --experts " << s.experts
                                                   << ": a token cannot choose more experts than there are");
  TESSERA_EXPECTS(s.ranks >= 1 && (!s.mesh.empty() || !s.pipeline.empty() || s.ranks <= s.experts),
                  "--ranks is " << s.ranks << ", it must be between 1 and --experts " << s.experts);
  const int ep = s.pipeline.empty() ? mesh_of(s).sizes.ep : 1;  // a pipeline's ranks have rules of their own
  TESSERA_EXPECTS(ep <= s.experts, "--mesh: ep = " << ep << " exceeds --experts " << s.experts);
  TESSERA_EXPECTS(s.checkpoint_every >= 0 && s.keep >= 0,
                  "--checkpoint-every " << s.checkpoint_every << " and --keep " << s.keep << " must not be negative");
  TESSERA_EXPECTS(!s.resume || !s.checkpoint.empty(), "--resume needs --checkpoint DIR: where to go on from");
  TESSERA_EXPECTS(s.rate > 0 && s.bias_rate >= 0 && s.loss_coefficient >= 0 && s.temperature > 0,
                  "--lr " << s.rate << " and --temperature " << s.temperature << " must be positive, --bias-rate "
                          << s.bias_rate << " and --loss-coefficient " << s.loss_coefficient << " not negative");
  TESSERA_EXPECTS(s.eval_every >= 0 && s.sample_bytes >= 0,
                  "--eval-every " << s.eval_every << " and --sample " << s.sample_bytes << " must not be negative");
  TESSERA_EXPECTS(s.sample_bytes == 0 || !s.prompt.empty(), "--prompt is empty, it must hold at least one byte");
  TESSERA_EXPECTS(!s.balances.empty(), "--balance names no way of balancing: none, loss or bias");
}

}  // namespace train_lm
