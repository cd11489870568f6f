// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

/// @file
/// train_lm: trains a byte-level mixture-of-experts language model with expert parallelism, on the host.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <tessera/comm/threads.hpp>
#include <tessera/core/error.hpp>
#if defined(TRAIN_LM_HAS_MPI)
#include <tessera/comm/mpi.hpp>
#endif

#include "baselines.hpp"
#include "command_line.hpp"
#include "corpus.hpp"
#include "metrics.hpp"
#include "pipeline_run.hpp"
#include "pipeline_settings.hpp"
#include "plots.hpp"
#include "progress.hpp"
#include "stop.hpp"
#include "trainer.hpp"

namespace train_lm {

// The layers are compiled in layers_threads.cpp and layers_mpi.cpp, the pipelined trainers in pipeline_threads.cpp and
// pipeline_mpi.cpp, side by side with this file.
template <>
std::unique_ptr<pipelined_run> make_pipelined_run(const settings&, balance_kind, const corpus&, ts::comm::threads&);
extern template std::unique_ptr<moe_block<float>> make_block(const settings&, balance_kind, const chunk_calls&,
                                                             ts::comm::threads&, ts::comm::threads&);
#if defined(TRAIN_LM_HAS_MPI)
template <>
std::unique_ptr<pipelined_run> make_pipelined_run(const settings&, balance_kind, const corpus&, ts::comm::mpi&);
extern template std::unique_ptr<moe_block<float>> make_block(const settings&, balance_kind, const chunk_calls&,
                                                             ts::comm::mpi&, ts::comm::mpi&);
#endif

namespace {

constexpr int exit_stopped = 130;

/// Ranks that a process manager has started, 0 without one.
int launched_processes() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}) {
    if (const char* value = std::getenv(name)) return std::atoi(value);
  }
  return 0;
}

void make_folder(const std::string& path) {
  std::error_code code;
  std::filesystem::create_directories(path, code);
  TESSERA_EXPECTS_AS(ts::error, !code, "the output folder '" << path << "' cannot be made: " << code.message());
}

/// What rank 0 does beside training: it speaks and writes. The other processes of mpirun keep silent.
class reporter {
 public:
  reporter(const settings& s, const corpus& text) : s_(s), text_(text) {
    make_folder(s.output);
    std::printf(
        "Text: %s\n  %zu files, %.1f MB; %.1f MB dropped as repetitions, %zu files kept\n"
        "  training %zu bytes, validation %zu bytes (%zu files)\n",
        text.source.c_str(), text.files_found, static_cast<double>(text.bytes_found) / 1e6,
        static_cast<double>(text.bytes_deduplicated) / 1e6, text.files_used, text.training.size(),
        text.validation.size(), text.validation_files);
    if (!s.baselines) return;
    references_.order2 = witten_bell(text.training, 2).bits_per_byte(text.validation);
    references_.compressor = compress_validation(text.training, text.validation, s.output);
    std::printf("Baselines on this split, bits per byte: order-2 model %.3f", references_.order2);
    if (references_.compressor) {
      std::printf(", %s %.3f", references_.compressor->command.c_str(), references_.compressor->bits_per_byte);
    } else {
      std::printf(" (no compressor: xz is not installed)");
    }
    std::printf("\n");
    std::fflush(stdout);
  }

  /// Writes the numbers of a run.
  void write(const run_result& run) const {
    make_folder(folder_of(run));
    write_run(folder_of(run), run);
  }

  /// Writes and draws a run that has ended.
  void finish(run_result run) {
    write(run);
    if (s_.plots) warn(plot_run(folder_of(run), run, references_));
    runs_.push_back(std::move(run));
  }

  /// Writes the comparison, prints the table and the last run's sample.
  void conclude() {
    if (s_.plots && runs_.size() > 1) warn(plot_comparison(s_.output, runs_, references_));
    const std::string table = summary(runs_, text_, references_);
    write_file(s_.output + "/summary.txt", table);
    std::fputs(table.c_str(), stdout);
    if (!runs_.back().sample.empty()) {
      std::printf("\nSample (balance %s):\n%s\n", name_of(runs_.back().balance), runs_.back().sample.c_str());
    }
    std::printf("\nWritten to %s\n", s_.output.c_str());
  }

 private:
  std::string folder_of(const run_result& run) const {
    return s_.balances.size() == 1 ? s_.output : s_.output + "/" + name_of(run.balance);
  }

  static void warn(const std::string& problem) {
    if (!problem.empty()) std::fprintf(stderr, "train_lm: no plots: %s\n", problem.c_str());
  }

  const settings& s_;
  const corpus& text_;
  baselines references_;
  std::vector<run_result> runs_;
};

/// One pipelined training run on this rank. @param report Only rank 0 uses it.
template <class Comm>
run_result run_pipelined(const settings& s, balance_kind balance, const corpus& text, Comm& comm,
                         const reporter* report) {
  const std::unique_ptr<pipelined_run> training = make_pipelined_run(s, balance, text, comm);
  if (comm.rank() != 0) return training->run(nullptr, {});
  std::printf("\n%s", training->description().c_str());
  std::fflush(stdout);
  progress bar(std::string("balance ") + name_of(balance), s.steps, s.quiet);
  return training->run(&bar, [&](const run_result& run) { report->write(run); });
}

/// One training run on this rank. @param report Only rank 0 uses it.
template <class Comm>
run_result run_on(const settings& s, balance_kind balance, const corpus& text, Comm& comm, const reporter* report) {
  if (is_pipelined(s)) return run_pipelined(s, balance, text, comm, report);
  trainer<float, Comm> training(s, balance, text, comm);
  const std::optional<resumed_run> resumed = training.start();
  if (comm.rank() != 0) return training.run(nullptr);
  const auto [all, active] = training.parameter_counts();
  std::printf("\nbalance %s: %lld parameters, %lld of them for one byte; %lld experts on %d ranks, %s combine\n",
              name_of(balance), static_cast<long long>(all), static_cast<long long>(active),
              static_cast<long long>(s.experts), comm.size(), name_of(s.combine));
  std::printf("  mesh %s, %.1f MB of parameters and optimizer state on a rank\n", name_of(training.mesh()).c_str(),
              static_cast<double>(training.state_bytes()) / 1e6);
  if (resumed) {
    std::printf("  resumed from %s: step %lld of %lld, saved by mesh %s, %.1f MB read\n", resumed->path.c_str(),
                static_cast<long long>(resumed->step), static_cast<long long>(s.steps), resumed->mesh.c_str(),
                static_cast<double>(resumed->bytes_read) / 1e6);
  } else if (s.resume) {
    std::printf("  no checkpoint in %s yet: starting anew\n", s.checkpoint.c_str());
  }
  std::fflush(stdout);
  progress bar(std::string("balance ") + name_of(balance), s.steps, s.quiet);
  return training.run(&bar, [&](const run_result& run) { report->write(run); });
}

int run_threads(const settings& s) {
  const corpus text = read_corpus({.paths = s.data});
  reporter report(s, text);
  bool stopped = false;
  for (const balance_kind balance : s.balances) {
    run_result result;
    ts::comm::threads::run(s.ranks, [&](ts::comm::threads& comm) {
      run_result own = run_on(s, balance, text, comm, &report);
      if (comm.rank() == 0) result = std::move(own);
    });
    stopped = result.stopped;
    report.finish(std::move(result));
    if (stopped) break;
  }
  report.conclude();
  return stopped ? exit_stopped : EXIT_SUCCESS;
}

#if defined(TRAIN_LM_HAS_MPI)
int run_processes(const settings& s, ts::comm::mpi& comm) {
  const corpus text = read_corpus({.paths = s.data});
  // Ranks on machines with other files would train on other text without noticing.
  std::int64_t own = static_cast<std::int64_t>(text.fingerprint >> 1), least = 0, most = 0;
  comm.all_reduce(ts::host_stream{}, &own, &least, 1, ts::reduce_op::min);
  comm.all_reduce(ts::host_stream{}, &own, &most, 1, ts::reduce_op::max);
  TESSERA_EXPECTS_AS(ts::error, least == most, "the ranks have read different texts: give all of them the same --data");
  std::unique_ptr<reporter> report;
  if (comm.rank() == 0) report = std::make_unique<reporter>(s, text);
  bool stopped = false;
  for (const balance_kind balance : s.balances) {
    run_result result = run_on(s, balance, text, comm, report.get());
    stopped = result.stopped;
    if (report) report->finish(std::move(result));
    if (stopped) break;
  }
  if (report) report->conclude();
  return stopped ? exit_stopped : EXIT_SUCCESS;
}
#endif

int complain(const char* what) {
  std::fprintf(stderr, "train_lm: error: %s\n", what);
  return EXIT_FAILURE;
}

#if defined(TRAIN_LM_HAS_MPI)
int run_under_mpi(int argc, char** argv, int processes) {
  const ts::comm::mpi_session session;
  // Rank 0 fits the baselines and draws while the others wait.
  ts::comm::mpi comm(MPI_COMM_WORLD, {.timeout = std::chrono::minutes(5)});
  int exit_code = EXIT_SUCCESS;
  std::optional<settings> s;
  try {
    s = read_command_line(argc, argv, processes, comm.rank() == 0, exit_code);
  } catch (const ts::error& e) {
    return comm.rank() == 0 ? complain(e.what()) : EXIT_FAILURE;  // the same on every rank
  }
  if (!s) return exit_code;
  try {
    watch_for_stop();
    return run_processes(*s, comm);
  } catch (const std::exception& e) {
    comm.fail(e.what());
    return complain(e.what());
  }
}
#endif

int run(int argc, char** argv) {
  const int processes = launched_processes();
#if defined(TRAIN_LM_HAS_MPI)
  if (processes > 0) return run_under_mpi(argc, argv, processes);
#endif
  TESSERA_EXPECTS_AS(ts::error, processes <= 1,
                     "started as one of " << processes << " processes, but built without MPI: use --ranks");
  int exit_code = EXIT_SUCCESS;
  const auto s = read_command_line(argc, argv, 0, true, exit_code);
  if (!s) return exit_code;
  watch_for_stop();
  return run_threads(*s);
}

}  // namespace
}  // namespace train_lm

int main(int argc, char** argv) {
  try {
    return train_lm::run(argc, argv);
  } catch (const std::exception& e) {
    return train_lm::complain(e.what());
  }
}
