// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/checkpoint/detail/parallel.hpp>
#include <tessera/comm/self.hpp>
#include <tessera/comm/threads.hpp>

#include "checkpoint_case.hpp"

using namespace tessera_test;

namespace {

// Large enough for several accesses to a file, and for huge pages; the last tensor is stored the other way round.
class large_model {
 public:
  static constexpr std::int64_t rows = 640;
  static constexpr std::int64_t columns = 1024;

  explicit large_model(int rank = 0, int num_ranks = 1) {
    const ts::box whole = ts::box::whole({rows, columns});
    const ts::box part = chunk_of(whole, 0, rank, num_ranks);
    for (int t = 0; t < 5; ++t) {
      memory_.emplace_back(static_cast<std::size_t>(part.volume()), -1);
      ck::target_piece& piece = targets_.emplace_back();
      static_cast<ck::piece_info&>(piece) = {"layer." + std::to_string(t), ck::element_type::i32, whole, part, ""};
      if (t == 4) piece.strides = {1, part.size[0], 0, 0};
      piece.data = memory_.back().data();
    }
  }

  void fill() {
    for_each([](std::int32_t& element, std::int32_t value) { element = value; });
  }
  std::int64_t differences() {
    std::int64_t count = 0;
    for_each([&](const std::int32_t& element, std::int32_t value) { count += element != value ? 1 : 0; });
    return count;
  }
  bool is_untouched() const {
    return std::all_of(memory_.begin(), memory_.end(), [](const std::vector<std::int32_t>& memory) {
      return std::all_of(memory.begin(), memory.end(), [](std::int32_t element) { return element == -1; });
    });
  }

  const std::vector<ck::target_piece>& targets() const { return targets_; }
  std::vector<ck::source_piece> sources() const { return {targets_.begin(), targets_.end()}; }

 private:
  // An element's value is its number in the whole model.
  template <class Visit>
  void for_each(Visit&& visit) {
    for (std::size_t t = 0; t < targets_.size(); ++t) {
      const ts::box& part = targets_[t].part;
      const bool turned = targets_[t].strides[0] != 0;
      for (std::int64_t r = 0; r < part.size[0]; ++r) {
        for (std::int64_t c = 0; c < columns; ++c) {
          const std::int64_t place = turned ? c * part.size[0] + r : r * columns + c;
          const std::int64_t value = (static_cast<std::int64_t>(t) * rows + part.offset[0] + r) * columns + c;
          visit(memory_[t][static_cast<std::size_t>(place)], static_cast<std::int32_t>(value));
        }
      }
    }
  }

  std::vector<std::vector<std::int32_t>> memory_;
  std::vector<ck::target_piece> targets_;
};

// Saves the model on `num_ranks` ranks, in blocks of 256 KiB.
std::string save_large(const temporary_folder& folder, int num_ranks) {
  ts::comm::threads::run(num_ranks, [&](ts::comm::threads& comm) {
    large_model model(comm.rank(), num_ranks);
    model.fill();
    const auto sources = model.sources();
    ck::saver saver(comm, {.directory = folder.str(), .sync = false});
    saver.save(ck::make_plan(comm, sources, {.block_bytes = 256 << 10}), sources, {.step = 1});
  });
  return folder / "step-1";
}

TEST_CASE("a loop on several threads takes every step once, and throws what a plain loop would throw") {
  for (const int num_threads : {1, 2, 5}) {
    for (const std::size_t count : {0, 1, 3, 200}) {
      std::vector<std::atomic<int>> taken(count);
      ck::detail::in_parallel(count, num_threads, [&](std::size_t i) { ++taken[i]; });
      CHECK(std::all_of(taken.begin(), taken.end(), [](const std::atomic<int>& n) { return n == 1; }));
    }
    for (int repeat = 0; repeat < 20; ++repeat) {
      std::atomic<int> late{0};
      std::atomic<bool> next_began{false};
      const std::string text = message_of<std::runtime_error>([&] {
        ck::detail::in_parallel(1000, num_threads, [&](std::size_t i) {
          if (i >= 100) ++late;
          if (i == 21) next_began = true;
          if (i == 20 && num_threads > 1) {  // two throw, in either order
            for (int ms = 0; ms < 1000 && !next_began; ++ms) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          }
          if (repeat % 2 == 0 ? i == 20 : i > 20) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          if (i >= 20 && i < 30) throw std::runtime_error("step " + std::to_string(i));
        });
      });
      CHECK(text == "step 20");
      CHECK(late == 0);
    }
  }
}

TEST_CASE("any number of threads loads the same, reads each byte once, and calls the observer one at a time") {
  temporary_folder folder;
  const std::string path = save_large(folder, 2);
  for (const int num_threads : {1, 2, 3, 16}) {
    for (const int ranks : {1, 3}) {
      CAPTURE(num_threads);
      CAPTURE(ranks);
      std::atomic<std::int64_t> differences{0};
      std::atomic<std::int64_t> read{0};
      std::atomic<int> overlaps{0};
      ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
        large_model model(comm.rank(), ranks);
        std::atomic<int> inside{0};
        ck::load_options options{.num_threads = num_threads};
        options.observer = [&](const ck::io_event& event) {
          if (inside++ != 0) ++overlaps;
          std::this_thread::sleep_for(std::chrono::microseconds(100));
          if (event.kind == ck::io_kind::read && contains(std::string(event.path), "rank-") && event.offset > 0) {
            read += event.bytes;
          }
          --inside;
        };
        ck::load(comm, path, model.targets(), options);
        differences += model.differences();
      });
      CHECK(differences == 0);
      CHECK(read == 5 * large_model::rows * large_model::columns * 4);
      CHECK(overlaps == 0);
    }
  }
  large_model model;
  ts::comm::self<ts::space::host> comm;
  CHECK(contains(message_of<ts::checkpoint_error>([&] { ck::load(comm, path, model.targets(), {.num_threads = 0}); }),
                 "num_threads is 0, it must be at least 1"));
  CHECK(model.is_untouched());
}

TEST_CASE("of several damaged blocks the first of the file is told, whichever thread finds its own first") {
  temporary_folder folder;
  const std::string path = save_large(folder, 1);
  const std::string file = path + "/rank-00000.safetensors";
  std::string bytes = read_file(file);
  const std::size_t data = static_cast<std::size_t>(ck::read_safetensors_header(file).data_begin);
  for (const std::size_t mib : {3, 5, 7, 9, 11}) {
    char& damaged = bytes[data + (mib << 20) + 5];
    damaged = static_cast<char>(damaged ^ 1);
  }
  write_file(file, bytes);
  ts::comm::self<ts::space::host> comm;
  for (int num_threads = 1; num_threads <= 5; ++num_threads) {
    large_model model;
    const std::string text =
        message_of<ts::checkpoint_error>([&] { ck::load(comm, path, model.targets(), {.num_threads = num_threads}); });
    // rows of 4 KiB, 640 of them in a tensor: 3 MiB are row 128 of the second, and blocks have 64 rows
    CHECK(contains(text, "rank-00000.safetensors: the checksum of [128, 192) x [0, 1024) of tensor 'layer.1'"));
    CHECK(model.is_untouched());
  }
}

TEST_CASE("a read that fails on any thread is told on all ranks, and no memory has changed") {
  temporary_folder folder;
  const std::string path = save_large(folder, 2);
  int failures = 0;
  for (int nth = 0;; ++nth) {
    std::vector<std::string> texts(2);
    std::atomic<int> changed{0};
    int accesses = 0;  // of rank 1, one at a time
    ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
      large_model model(comm.rank(), 2);
      ck::load_options options{.num_threads = 3};
      if (comm.rank() == 1) {
        options.observer = [&](const ck::io_event&) {
          if (accesses++ == nth) throw std::runtime_error("the disk is gone");
        };
      }
      std::string& text = texts[static_cast<std::size_t>(comm.rank())];
      text = message_of<ts::checkpoint_error>([&] { ck::load(comm, path, model.targets(), options); });
      if (text.empty() ? model.differences() != 0 : !model.is_untouched()) ++changed;
    });
    CHECK(texts[0] == texts[1]);
    CHECK(changed == 0);
    if (texts[0].empty()) break;
    CHECK(contains(texts[0], "rank 1: the disk is gone"));
    ++failures;
  }
  CHECK(failures >= 3);
}

}  // namespace
