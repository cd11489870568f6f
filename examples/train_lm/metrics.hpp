// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a run has measured, and the files that keep it.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "baselines.hpp"
#include "corpus.hpp"
#include "settings.hpp"

namespace train_lm {

/// Bits per nat.
inline constexpr double bits_per_nat = 1.4426950408889634;

/// One optimizer step.
struct step_metrics {
  std::int64_t step = 0;                 ///< From 1.
  double loss = 0;                       ///< Mean cross entropy of the step's bytes, nats.
  double auxiliary = 0;                  ///< Auxiliary losses of all layers, coefficients included.
  double gradient_norm = 0;              ///< Before clipping.
  double rate = 0;                       ///< Learning rate.
  double tokens_per_second = 0;          ///< Over all ranks.
  std::vector<double> imbalance;         ///< Per layer: largest expert load over the mean.
  std::optional<double> validation;      ///< Bits per byte, where measured.
  std::vector<double> mtp_losses;        ///< Of each depth of multi-token prediction: mean of its bytes, nats.
  std::vector<double> draft_acceptance;  ///< `draft_result::acceptance`, where measured.

  /// The worst layer's imbalance.
  double worst_imbalance() const;
};

/// Loads of a layer's experts, summed over an interval of steps.
struct load_interval {
  std::int64_t last_step = 0;                    ///< The interval ends with this step.
  std::vector<std::vector<std::int64_t>> loads;  ///< `[layers][E]` pairs.
};

/// What became of the drafts of multi-token prediction while the model continued stretches of the validation text.
struct draft_result {
  std::vector<double> acceptance;  ///< Of each depth: the share of its proposals that the model would have written.
  double bytes_per_call = 0;       ///< Bytes written for each call of the main model; 1 without drafts.
  std::int64_t bytes = 0;          ///< Bytes written, the same ones as without drafts.
};

/// Everything one training run leaves behind.
struct run_result {
  balance_kind balance = balance_kind::none;  ///< How it was balanced.
  int ranks = 1;                              ///< Ranks.
  std::vector<step_metrics> steps;            ///< In order.
  std::vector<load_interval> loads;           ///< In order, about a hundred.
  double validation = 0;                      ///< Bits per byte at the end.
  double seconds = 0;                         ///< Training time.
  std::int64_t bytes_seen = 0;                ///< Training bytes.
  std::int64_t parameters = 0;                ///< All of them, and
  std::int64_t active_parameters = 0;         ///< those that one token uses.
  draft_result drafts;                        ///< With --mtp, at the end.
  std::string sample;                         ///< Prompt and generated text.
  bool stopped = false;                       ///< Ended by Ctrl-C.

  /// Mean of the worst layer's imbalance over the last tenth of the steps.
  double final_imbalance() const;
  /// Mean loss over the last tenth of the steps, bits per byte.
  double final_training() const;
};

/// Writes `metrics.csv`, `load.csv` and `sample.txt` to `folder`. @throws tessera::error if it cannot.
void write_run(const std::string& folder, const run_result& run);

/// One table of all runs beside the baselines, for people.
std::string summary(const std::vector<run_result>& runs, const corpus& text, const baselines& references);

/// Writes `text` to a file. @throws tessera::error with the reason if it cannot.
void write_file(const std::string& path, const std::string& text);

}  // namespace train_lm
