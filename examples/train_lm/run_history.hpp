// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a run has measured so far as tensors, so that a checkpoint carries it on with all its bits.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <tessera/checkpoint/piece.hpp>

#include "checkpoints.hpp"
#include "metrics.hpp"

namespace train_lm {

/// Flat copies of a run's metrics. Only rank 0 saves and loads them.
class run_history {
 public:
  /// From a run.
  explicit run_history(const run_result& run) {
    steps_ = static_cast<std::int64_t>(run.steps.size());
    layers_ = run.steps.empty() ? 0 : static_cast<std::int64_t>(run.steps.front().imbalance.size());
    for (const step_metrics& s : run.steps) {
      const double none = std::numeric_limits<double>::quiet_NaN();
      for (const double value :
           {s.loss, s.auxiliary, s.gradient_norm, s.rate, s.tokens_per_second, s.validation.value_or(none)})
        metrics_.push_back(value);
      metrics_.insert(metrics_.end(), s.imbalance.begin(), s.imbalance.end());
    }
    for (const load_interval& interval : run.loads) {
      last_steps_.push_back(interval.last_step);
      for (const auto& loads : interval.loads) {
        experts_ = static_cast<std::int64_t>(loads.size());
        loads_.insert(loads_.end(), loads.begin(), loads.end());
      }
    }
  }

  /// With room for that of a checkpoint.
  explicit run_history(const found_checkpoint& from) {
    const ts::box metrics = shape_of(from, "history.metrics"), loads = shape_of(from, "history.loads");
    steps_ = metrics.size[0];
    layers_ = metrics.size[1] - num_values;
    experts_ = loads.size[2];
    metrics_.resize(static_cast<std::size_t>(metrics.volume()));
    last_steps_.resize(static_cast<std::size_t>(loads.size[0]));
    loads_.resize(static_cast<std::size_t>(loads.volume()));
  }

  /// Where the tensors are.
  std::vector<ts::checkpoint::target_piece> pieces() {
    const auto intervals = static_cast<std::int64_t>(last_steps_.size());
    return {
        ts::checkpoint::piece_of("history.metrics", metrics_.data(), ts::box::whole({steps_, num_values + layers_})),
        ts::checkpoint::piece_of("history.load_steps", last_steps_.data(), ts::box::whole({intervals})),
        ts::checkpoint::piece_of("history.loads", loads_.data(), ts::box::whole({intervals, layers_, experts_}))};
  }

  /// Back into a run.
  void restore(run_result& run) const {
    run.steps.clear();
    run.loads.clear();
    const double* value = metrics_.data();
    for (std::int64_t i = 0; i < steps_; ++i) {
      step_metrics s;
      s.step = i + 1;
      s.loss = *value++;
      s.auxiliary = *value++;
      s.gradient_norm = *value++;
      s.rate = *value++;
      s.tokens_per_second = *value++;
      if (!std::isnan(*value)) s.validation = *value;
      ++value;
      s.imbalance.assign(value, value + layers_);
      value += layers_;
      run.steps.push_back(std::move(s));
    }
    const std::int64_t* load = loads_.data();
    for (const std::int64_t last : last_steps_) {
      load_interval interval{last, {}};
      for (std::int64_t l = 0; l < layers_; ++l, load += experts_) interval.loads.emplace_back(load, load + experts_);
      run.loads.push_back(std::move(interval));
    }
  }

 private:
  static constexpr std::int64_t num_values = 6;

  static ts::box shape_of(const found_checkpoint& from, const char* name) {
    const auto found = from.shapes.find(name);
    const int rank = std::string(name) == "history.loads" ? 3 : 2;
    TESSERA_EXPECTS_AS(ts::checkpoint_error,
                       found != from.shapes.end() && found->second.rank == rank && found->second.volume() > 0,
                       from.path << " has no '" << name << "': train_lm did not save it");
    return found->second;
  }

  std::int64_t steps_ = 0, layers_ = 0, experts_ = 0;
  std::vector<double> metrics_;
  std::vector<std::int64_t> last_steps_, loads_;
};

}  // namespace train_lm
