// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#include "metrics.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <fstream>

#include <tessera/core/error.hpp>

namespace train_lm {
namespace {

/// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...) {
  char buffer[256];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

template <class Value>
double tail_mean(const std::vector<step_metrics>& steps, Value value) {
  if (steps.empty()) return 0;
  const std::size_t count = std::max<std::size_t>(1, steps.size() / 10);
  double sum = 0;
  for (std::size_t i = steps.size() - count; i < steps.size(); ++i) sum += value(steps[i]);
  return sum / static_cast<double>(count);
}

}  // namespace

double step_metrics::worst_imbalance() const {
  return imbalance.empty() ? 0 : *std::max_element(imbalance.begin(), imbalance.end());
}

double run_result::final_imbalance() const {
  return tail_mean(steps, [](const step_metrics& s) { return s.worst_imbalance(); });
}

double run_result::final_training() const {
  return tail_mean(steps, [](const step_metrics& s) { return s.loss * bits_per_nat; });
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.flush();
  TESSERA_EXPECTS_AS(tessera::error, out.good(), "'" << path << "' cannot be written: " << std::strerror(errno));
}

void write_run(const std::string& folder, const run_result& run) {
  // loss_hex is the loss with all its bits: what the comparison of rank counts reads.
  std::string csv = "step,bytes,loss,bpb,aux_loss,grad_norm,lr,tokens_per_s,load_max_over_mean";
  const std::size_t layers = run.steps.empty() ? 0 : run.steps.front().imbalance.size();
  for (std::size_t l = 0; l < layers; ++l) csv += format(",load_max_over_mean_layer%zu", l);
  const std::size_t depths = run.steps.empty() ? 0 : run.steps.front().mtp_losses.size();
  for (std::size_t k = 1; k <= depths; ++k) csv += format(",mtp_loss_%zu", k);
  for (std::size_t k = 1; k <= depths; ++k) csv += format(",draft_acceptance_%zu", k);
  csv += ",validation_bpb,loss_hex\n";
  const auto steps_seen = static_cast<std::int64_t>(run.steps.size());
  for (const step_metrics& s : run.steps) {
    csv += format("%lld,%lld,%.6f,%.6f,%.6g,%.6g,%.6g,%.0f,%.4f", static_cast<long long>(s.step),
                  static_cast<long long>(run.bytes_seen / steps_seen * s.step), s.loss, s.loss * bits_per_nat,
                  s.auxiliary, s.gradient_norm, s.rate, s.tokens_per_second, s.worst_imbalance());
    for (const double value : s.imbalance) csv += format(",%.4f", value);
    for (const double value : s.mtp_losses) csv += format(",%.6f", value);
    for (std::size_t k = 0; k < depths; ++k)
      csv += k < s.draft_acceptance.size() ? format(",%.4f", s.draft_acceptance[k]) : std::string(",");
    csv += s.validation ? format(",%.6f", *s.validation) : std::string(",");
    csv += format(",%a\n", s.loss);
  }
  write_file(folder + "/metrics.csv", csv);

  csv = "step,layer,expert,pairs,load_over_mean\n";
  for (const load_interval& interval : run.loads) {
    for (std::size_t l = 0; l < interval.loads.size(); ++l) {
      const auto& loads = interval.loads[l];
      double total = 0;
      for (const std::int64_t pairs : loads) total += static_cast<double>(pairs);
      for (std::size_t e = 0; e < loads.size(); ++e) {
        const double ratio = total == 0 ? 0 : static_cast<double>(loads[e]) * static_cast<double>(loads.size()) / total;
        csv += format("%lld,%zu,%zu,%lld,%.4f\n", static_cast<long long>(interval.last_step), l, e,
                      static_cast<long long>(loads[e]), ratio);
      }
    }
  }
  write_file(folder + "/load.csv", csv);
  if (!run.sample.empty()) write_file(folder + "/sample.txt", run.sample + "\n");
}

std::string summary(const std::vector<run_result>& runs, const corpus& text, const baselines& references) {
  std::string out = format("\nBits per byte of the validation text (%zu bytes, %zu files)\n", text.validation.size(),
                           text.validation_files);
  if (references.order2 > 0) out += format("  order-2 model (Witten-Bell)        %6.3f\n", references.order2);
  if (references.compressor) {
    out += format("  %-33s  %6.3f\n", (references.compressor->command + ", after the training text").c_str(),
                  references.compressor->bits_per_byte);
  }
  out += "\n  balance   validation bpb   below order-2   training bpb   max/mean load*   bytes/s   seconds\n";
  for (const run_result& run : runs) {
    out +=
        format("  %-7s   %14.3f   %13.3f   %12.3f   %14.2f   %7.0f   %7.1f%s\n", name_of(run.balance), run.validation,
               references.order2 > 0 ? references.order2 - run.validation : 0.0, run.final_training(),
               run.final_imbalance(), run.seconds > 0 ? static_cast<double>(run.bytes_seen) / run.seconds : 0.0,
               run.seconds, run.stopped ? "   (stopped early)" : "");
  }
  out += "  * worst layer's largest expert load over the mean; mean of the last tenth of the steps\n";
  for (const run_result& run : runs) {
    if (run.drafts.acceptance.empty()) continue;
    out += format("\n  balance %s: drafts of multi-token prediction on validation text, accepted at depth",
                  name_of(run.balance));
    for (std::size_t k = 0; k < run.drafts.acceptance.size(); ++k)
      out += format("%s %zu: %.3f", k == 0 ? "" : ",", k + 1, run.drafts.acceptance[k]);
    out += format(";\n  %.2f bytes for each call of the main model, the same %lld bytes as without drafts\n",
                  run.drafts.bytes_per_call, static_cast<long long>(run.drafts.bytes));
  }
  return out;
}

}  // namespace train_lm
