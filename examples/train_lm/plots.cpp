// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#include "plots.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include <sys/wait.h>

namespace train_lm {
namespace {

/// Runs gnuplot in `folder` on `script`, which is kept there under `name`.
std::string draw(const std::string& folder, const std::string& name, const std::string& script) {
  write_file(folder + "/" + name, script);
  std::string word = "'";  // the folder as one word for the shell
  for (const char c : folder) word += c == '\'' ? std::string("'\\''") : std::string(1, c);
  word += "'";
  const int status = std::system(("cd " + word + " && gnuplot '" + name + "' >gnuplot.log 2>&1").c_str());
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
    std::remove((folder + "/gnuplot.log").c_str());
    return {};
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 127) return "gnuplot is not installed (package gnuplot-nox)";
  return "gnuplot failed on " + folder + "/" + name + ", see gnuplot.log beside it";
}

/// A named block of data in a gnuplot script: step and the mean of `value` over the `half` steps before and after it.
template <class Value>
void curve(std::ostream& script, const std::string& name, const std::vector<step_metrics>& steps, Value value,
           std::int64_t half) {
  const auto n = static_cast<std::int64_t>(steps.size());
  script << "$" << name << " << EOD\n";
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t first = std::max<std::int64_t>(0, i - half), last = std::min(n - 1, i + half);
    double sum = 0;
    for (std::int64_t j = first; j <= last; ++j) sum += value(steps[static_cast<std::size_t>(j)]);
    script << steps[static_cast<std::size_t>(i)].step << ' ' << sum / static_cast<double>(last - first + 1) << '\n';
  }
  script << "EOD\n";
}

/// Half of a fortieth of the run: what curves are smoothed over.
std::int64_t smoothing(const run_result& run) {
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(run.steps.size()) / 80);
}

double bits(const step_metrics& step) { return step.loss * bits_per_nat; }
double imbalance(const step_metrics& step) { return step.worst_imbalance(); }

constexpr const char* style =
    "set encoding utf8\n"
    "set style line 1 lc rgb '#c44e52' lw 2\n"
    "set style line 2 lc rgb '#dd8452' lw 2\n"
    "set style line 3 lc rgb '#4c72b0' lw 2\n"
    "set style line 8 lc rgb '#555555' lw 1.5 dt 2\n"
    "set style line 9 lc rgb '#999999' lw 1.5 dt 4\n"
    "set grid lc rgb '#e4e4e4' lt 1\n"
    "set border 3 lc rgb '#444444'\n"
    "set tics nomirror\n";

/// Horizontal lines of the baselines, as further elements of a plot command.
void plot_baselines(std::ostream& script, const baselines& references) {
  if (references.order2 > 0) {
    script << ", \\\n  " << references.order2 << " with lines ls 8 title 'order-2 model, validation'";
  }
  if (references.compressor) {
    script << ", \\\n  " << references.compressor->bits_per_byte << " with lines ls 9 title '"
           << references.compressor->command << ", validation'";
  }
}

int line_style(balance_kind kind) { return kind == balance_kind::none ? 1 : kind == balance_kind::loss ? 2 : 3; }

}  // namespace

std::string plot_run(const std::string& folder, const run_result& run, const baselines& references) {
  if (run.steps.empty()) return "there is nothing to draw: no step was finished";
  const std::string title = std::string("balance ") + name_of(run.balance);
  std::ostringstream script;
  script << style << "set terminal svg size 900,520 dynamic background rgb 'white' font 'sans,13'\n"
         << "set output 'loss.svg'\n";
  curve(script, "steps", run.steps, bits, 0);
  curve(script, "mean", run.steps, bits, smoothing(run));
  script << "$validation << EOD\n";
  for (const step_metrics& step : run.steps)
    if (step.validation) script << step.step << ' ' << *step.validation << '\n';
  // The final value also stands where no interim validation was asked for, so the block is never empty.
  script << run.steps.back().step << ' ' << run.validation << "\nEOD\n"
         << "set title 'Loss, " << title << "'\nset xlabel 'step'\nset ylabel 'bits per byte'\n"
         << "set yrange [0:*]\nset xrange [1:" << std::max<std::int64_t>(2, run.steps.back().step) << "]\n"
         << "set key top right\n"
         << "plot $steps with lines lc rgb '#c9d3e6' notitle, \\\n"
         << "  $mean with lines ls 3 title 'training', \\\n"
         << "  $validation with points pt 7 ps 0.8 lc rgb '#55a868' title 'validation'";
  plot_baselines(script, references);
  script << "\n";
  if (const std::string problem = draw(folder, "loss.gp", script.str()); !problem.empty()) return problem;

  if (run.loads.empty()) return {};
  const std::size_t layers = run.loads.front().loads.size(), experts = run.loads.front().loads.front().size();
  std::ostringstream heat;
  heat << style << "set terminal svg size 900," << 60 + 300 * layers
       << " dynamic background rgb 'white' font 'sans,13'\nset output 'load.svg'\n";
  for (std::size_t l = 0; l < layers; ++l) {
    heat << "$layer" << l << " << EOD\n";
    for (std::size_t e = 0; e < experts; ++e) {
      for (const load_interval& interval : run.loads) {
        double total = 0;
        for (const std::int64_t pairs : interval.loads[l]) total += static_cast<double>(pairs);
        heat << (total == 0 ? 0 : static_cast<double>(interval.loads[l][e]) * static_cast<double>(experts) / total)
             << ' ';
      }
      heat << '\n';
    }
    heat << "EOD\n";
  }
  const double steps_per_column = static_cast<double>(run.steps.size()) / static_cast<double>(run.loads.size());
  heat << "unset grid\nset tics out\n"
       << "set palette defined (0 '#f7f7f7', 0.5 '#c6dbef', 1 '#6baed6', 2 '#fd8d3c', 3 '#d7301f', 4 '#67000d')\n"
       << "set cbrange [0:4]\nset cblabel 'load / mean'\nset xlabel 'step'\nset ylabel 'expert'\n"
       << "set xrange [0:" << run.steps.size() << "]\nset yrange [-0.5:" << static_cast<double>(experts) - 0.5 << "]\n"
       << "set multiplot layout " << layers << ",1\n";
  for (std::size_t l = 0; l < layers; ++l) {
    heat << "set title 'Expert load, " << title << ", layer " << l << "'\n"
         << "plot $layer" << l << " matrix using (($1 + 0.5) * " << steps_per_column
         << "):2:3 with image pixels notitle\n";
  }
  heat << "unset multiplot\n";
  return draw(folder, "load.gp", heat.str());
}

std::string plot_comparison(const std::string& folder, const std::vector<run_result>& runs,
                            const baselines& references) {
  std::ostringstream script;
  script << style << "set terminal svg size 1280,520 dynamic background rgb 'white' font 'sans,13'\n"
         << "set output 'comparison.svg'\n";
  std::int64_t last_step = 2;
  double worst = 1, highest = 0;  // room above the curves for the key, and the start of training left out
  for (const run_result& run : runs) {
    if (run.steps.empty()) return "there is nothing to compare: a run finished no step";
    curve(script, std::string("loss_") + name_of(run.balance), run.steps, bits, smoothing(run));
    curve(script, std::string("load_") + name_of(run.balance), run.steps, imbalance, smoothing(run));
    last_step = std::max(last_step, run.steps.back().step);
    for (const step_metrics& step : run.steps) worst = std::max(worst, step.worst_imbalance());
    for (std::size_t i = run.steps.size() / 10; i < run.steps.size(); ++i)
      highest = std::max(highest, bits(run.steps[i]));
  }
  const auto curves = [&](const char* what) {
    for (std::size_t i = 0; i < runs.size(); ++i) {
      script << (i == 0 ? "" : ", \\\n  ") << '$' << what << '_' << name_of(runs[i].balance) << " with lines ls "
             << line_style(runs[i].balance) << " title '" << name_of(runs[i].balance) << "'";
    }
  };
  script << "set multiplot layout 1,2\nset xlabel 'step'\nset xrange [1:" << last_step << "]\nset key top right\n"
         << "set title 'What balancing buys: largest expert load / mean (worst layer)'\n"
         << "set ylabel 'max / mean load'\nset yrange [0:" << 1.3 * worst << "]\nplot ";
  curves("load");
  script << ", \\\n  1 with lines ls 9 title 'perfect balance'\n"
         << "set title 'and what it costs: training loss'\nset ylabel 'bits per byte'\nset yrange [1:" << 1.2 * highest
         << "]\nplot ";
  curves("loss");
  plot_baselines(script, references);
  script << "\nunset multiplot\n";
  return draw(folder, "comparison.gp", script.str());
}

}  // namespace train_lm
