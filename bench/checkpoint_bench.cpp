// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Checkpoints on the disk under TESSERA_BENCH_FOLDER (else the system's folder for temporary files), against plain
// sequential writes and reads of the same bytes there, with the same fsync and the same empty cache. Cases with a share
// write or read both ways in turn, several times, so that both see the same disk. They report the median of the
// checkpoint's times, that of the sequential ones, and as `share` the median of their quotients (sequential time
// divided by the checkpoint's of the same turn): disks that others use have turns that say nothing. Planning times are
// for 100,000 chunks.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <tessera/checkpoint/checkpoint.hpp>
#include <tessera/comm/threads.hpp>

#include "context.hpp"

namespace {

namespace ts = tessera;
namespace ck = tessera::checkpoint;
namespace fs = std::filesystem;
using clock_type = std::chrono::steady_clock;

double seconds_since(clock_type::time_point begin) {
  return std::chrono::duration<double>(clock_type::now() - begin).count();
}

class scratch_folder {
 public:
  scratch_folder() {
    const char* chosen = std::getenv("TESSERA_BENCH_FOLDER");
    path_ = (chosen != nullptr ? fs::path(chosen) : fs::temp_directory_path()) /
            ("tessera-bench-" + std::to_string(::getpid()));
    fs::create_directories(path_);
  }
  scratch_folder(const scratch_folder&) = delete;
  scratch_folder& operator=(const scratch_folder&) = delete;
  ~scratch_folder() {
    std::error_code code;
    fs::remove_all(path_, code);
  }
  std::string operator/(const char* name) const { return (path_ / name).string(); }
  std::string str() const { return path_.string(); }

 private:
  fs::path path_;
};

void expect(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

constexpr std::int64_t block = std::int64_t{4} << 20;

// As dd bs=4M conv=fsync does it.
double sequential_write(const std::string& path, const std::vector<std::byte>& bytes) {
  const auto begin = clock_type::now();
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  expect(file >= 0, "open");
  for (std::size_t at = 0; at < bytes.size();) {
    const ssize_t n = ::write(file, bytes.data() + at, std::min<std::size_t>(block, bytes.size() - at));
    expect(n > 0, "write");
    at += static_cast<std::size_t>(n);
  }
  expect(::fsync(file) == 0, "fsync");
  ::close(file);
  return seconds_since(begin);
}

double sequential_read(const std::string& path, std::vector<std::byte>& bytes) {
  const auto begin = clock_type::now();
  const int file = ::open(path.c_str(), O_RDONLY);
  expect(file >= 0, "open");
  for (std::size_t at = 0; at < bytes.size();) {
    const ssize_t n = ::read(file, bytes.data() + at, std::min<std::size_t>(block, bytes.size() - at));
    expect(n > 0, "read");
    at += static_cast<std::size_t>(n);
  }
  ::close(file);
  return seconds_since(begin);
}

// Lets the system forget what it has of the files in a folder, so that the next read comes from the disk.
void forget(const std::string& folder) {
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    const int file = ::open(entry.path().c_str(), O_RDONLY);
    expect(file >= 0, "open");
    ::fdatasync(file);
    ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    ::close(file);
  }
}

// A few tensors of `total` bytes in all, sharded along dimension 0; those of one rank in one piece of memory.
struct rank_model {
  std::vector<std::byte> memory;
  std::vector<ck::target_piece> targets;
  std::vector<ck::source_piece> sources;

  rank_model(int rank, int ranks, std::int64_t total) {
    constexpr std::int64_t columns = 4096;
    constexpr int tensors = 16;
    const std::int64_t rows = total / (4 * columns * tensors);
    const std::int64_t first = rows * rank / ranks;
    const std::int64_t own = rows * (rank + 1) / ranks - first;
    memory.resize(static_cast<std::size_t>(own * columns * 4 * tensors));
    for (std::size_t i = 0; i < memory.size(); i += 512) memory[i] = static_cast<std::byte>(i >> 9);
    for (int t = 0; t < tensors; ++t) {
      const ts::box whole = ts::box::whole({rows, columns});
      ts::box part = whole;
      part.offset[0] = first;
      part.size[0] = own;
      targets.push_back({{"layer." + std::to_string(t) + ".weight", ck::element_type::f32, whole, part, ""},
                         memory.data() + t * own * columns * 4});
    }
    sources.assign(targets.begin(), targets.end());
  }
};

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Runs both ways in turn; `run(true)` is the checkpoint. All seconds.
template <class Run>
void compare(benchmark::State& state, std::int64_t bytes, Run&& run) {
  constexpr int turns = 11;
  std::vector<double> plain;
  std::vector<double> own;
  std::vector<double> share;
  for (auto _ : state) {
    for (int turn = 0; turn < turns; ++turn) {
      const bool own_first = turn % 2 == 1;
      const double first = run(own_first);
      const double second = run(!own_first);
      plain.push_back(own_first ? second : first);
      own.push_back(own_first ? first : second);
      share.push_back(plain.back() / own.back());
    }
    state.SetIterationTime(median(own));
  }
  state.counters["sequential_ms"] = median(plain) * 1e3;
  state.counters["share"] = median(share);
  tessera_bench::report_rates(state, 0, static_cast<double>(bytes));
}

void save(benchmark::State& state) {
  const int ranks = static_cast<int>(state.range(0));
  const std::int64_t bytes = state.range(1) << 20;
  const scratch_folder folder;
  std::vector<rank_model> models;
  for (int r = 0; r < ranks; ++r) models.emplace_back(r, ranks, bytes);
  const std::vector<std::byte> plain(static_cast<std::size_t>(bytes), std::byte{3});
  const ck::save_plan plan = ck::make_plan(
      ranks, [&](int r) -> const auto& { return models[static_cast<std::size_t>(r)].sources; });
  compare(state, bytes, [&](bool own) {
    fs::remove_all(folder / "run");
    fs::remove(folder / "plain");
    ::sync();
    if (!own) return sequential_write(folder / "plain", plain);
    const auto begin = clock_type::now();
    ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
      ck::saver saver(comm, {.directory = folder / "run"});
      saver.save(plan, models[static_cast<std::size_t>(comm.rank())].sources, {.step = 1});
    });
    return seconds_since(begin);
  });
}

// From `from` ranks to `ranks`: with the same number, and with another, when rows travel.
void load(benchmark::State& state) {
  const int from = static_cast<int>(state.range(0));
  const int ranks = static_cast<int>(state.range(1));
  const std::int64_t bytes = state.range(2) << 20;
  const scratch_folder folder;
  {
    std::vector<rank_model> models;
    for (int r = 0; r < from; ++r) models.emplace_back(r, from, bytes);
    ts::comm::threads::run(from, [&](ts::comm::threads& comm) {
      const auto& sources = models[static_cast<std::size_t>(comm.rank())].sources;
      ck::saver(comm, {.directory = folder / "run"}).save(ck::make_plan(comm, sources), sources, {.step = 1});
    });
  }
  std::vector<std::byte> plain(static_cast<std::size_t>(bytes), std::byte{3});
  sequential_write(folder / "plain", plain);
  std::vector<rank_model> models;
  for (int r = 0; r < ranks; ++r) models.emplace_back(r, ranks, bytes);
  compare(state, bytes, [&](bool own) {
    forget(folder.str());
    if (!own) return sequential_read(folder / "plain", plain);
    const auto begin = clock_type::now();
    ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
      const auto result = ck::resume(comm, folder / "run", models[static_cast<std::size_t>(comm.rank())].targets);
      expect(result.has_value(), "load");
    });
    return seconds_since(begin);
  });
}

// What a training step waits for: the copy into the staging memory.
void stage(benchmark::State& state) {
  const std::int64_t bytes = state.range(0) << 20;
  const scratch_folder folder;
  const rank_model model(0, 1, bytes);
  ts::comm::threads::run(1, [&](ts::comm::threads& comm) {
    const ck::save_plan plan = ck::make_plan(comm, model.sources);
    ck::saver saver(comm, {.directory = folder / "run", .keep_last = 1});
    std::int64_t step = 0;
    saver.save_async(plan, model.sources, {.step = step++});
    saver.wait();  // the staging memory is there now
    for (auto _ : state) {
      const auto begin = clock_type::now();
      saver.save_async(plan, model.sources, {.step = step++});
      state.SetIterationTime(seconds_since(begin));
      saver.wait();
    }
  });
  tessera_bench::report_rates(state, 0, static_cast<double>(bytes));
}

// `chunks` parts in all: as many tensors as it takes where each is sharded over `saved_shards`. What `ranks` ranks hold
// of them, each part in `replicas` copies.
std::vector<std::vector<ck::piece_info>> many_pieces(std::int64_t chunks, int saved_shards, int ranks, int replicas) {
  std::vector<std::vector<ck::piece_info>> pieces(static_cast<std::size_t>(ranks));
  const int shards = ranks / replicas;
  const ts::box whole = ts::box::whole({saved_shards * 2, 512});
  const std::int64_t rows = whole.size[0] / shards;
  for (std::int64_t t = 0; t < chunks / saved_shards; ++t) {
    for (int r = 0; r < ranks; ++r) {
      ts::box part = whole;
      part.offset[0] = (r % shards) * rows;
      part.size[0] = rows;
      pieces[static_cast<std::size_t>(r)].push_back(
          {"model.layers." + std::to_string(t) + ".mlp.experts.weight", ck::element_type::bf16, whole, part, ""});
    }
  }
  return pieces;
}

// The pieces that a save with these arguments has: chunks, ranks, replicas.
std::vector<std::vector<ck::piece_info>> saved_pieces(const benchmark::State& state) {
  const auto ranks = static_cast<int>(state.range(1));
  const auto replicas = static_cast<int>(state.range(2));
  return many_pieces(state.range(0), ranks / replicas, ranks, replicas);
}

void plan_save(benchmark::State& state) {
  const auto pieces = saved_pieces(state);
  std::int64_t chunks = 0;
  for (auto _ : state) {
    const ck::save_plan plan = ck::make_plan(pieces);
    chunks = static_cast<std::int64_t>(plan.chunks.size());
    benchmark::DoNotOptimize(plan.digest);
  }
  tessera_bench::report_rates(state, 0, 0, static_cast<double>(chunks));
}

// The manifest that such a plan leads to.
ck::manifest manifest_of(const ck::save_plan& plan) {
  std::vector<ck::detail::written_file> written(static_cast<std::size_t>(plan.num_ranks));
  for (std::size_t r = 0; r < written.size(); ++r) {
    written[r].header_bytes = 64;
    written[r].bytes = 64 + plan.bytes[r];
    written[r].checksums.assign(plan.writes[r].size(), {std::uint64_t{1}});
  }
  return ck::detail::make_manifest(plan, {}, written);
}

void plan_load(benchmark::State& state) {
  const auto ranks = static_cast<int>(state.range(1));
  const auto replicas = static_cast<int>(state.range(2));
  const ck::manifest content = manifest_of(ck::make_plan(saved_pieces(state)));
  const auto pieces = many_pieces(state.range(0), ranks / replicas, ranks / 2, replicas);  // on half the ranks
  std::int64_t units = 0;
  for (auto _ : state) {
    const ck::read_plan plan = ck::plan_reads(content, pieces, "manifest");
    units = static_cast<std::int64_t>(plan.units.size());
    benchmark::DoNotOptimize(plan.units.data());
  }
  tessera_bench::report_rates(state, 0, 0, static_cast<double>(units));
}

void check_manifest(benchmark::State& state) {
  const ck::manifest content = manifest_of(ck::make_plan(saved_pieces(state)));
  for (auto _ : state) ck::expect_manifest(content, "manifest");
  tessera_bench::report_rates(state, 0, 0, static_cast<double>(state.range(0)));
}

BENCHMARK(save)->ArgNames({"ranks", "mib"})->Args({1, 1024})->Args({4, 1024})->Iterations(1)->UseManualTime();
BENCHMARK(load)
    ->ArgNames({"from", "ranks", "mib"})
    ->Args({1, 1, 1024})
    ->Args({4, 4, 1024})
    ->Args({4, 3, 1024})
    ->Iterations(1)
    ->UseManualTime();
BENCHMARK(stage)->ArgNames({"mib"})->Arg(256)->Iterations(5)->UseManualTime();
BENCHMARK(plan_save)
    ->ArgNames({"chunks", "ranks", "replicas"})
    ->Args({100000, 64, 1})
    ->Args({100000, 64, 4})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(plan_load)
    ->ArgNames({"chunks", "ranks", "replicas"})
    ->Args({100000, 64, 1})
    ->Args({100000, 64, 4})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(check_manifest)
    ->ArgNames({"chunks", "ranks", "replicas"})
    ->Args({100000, 64, 1})
    ->Unit(benchmark::kMillisecond);

}  // namespace

TESSERA_BENCHMARK_MAIN()
