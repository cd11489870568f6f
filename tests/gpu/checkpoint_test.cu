// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Checkpoints of device memory: what is saved from a GPU loads into host memory and the other way round, for any
// division among ranks (threads that share one GPU), and a save under way does not see later changes. Without a GPU it
// says so and exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include "device_fixture.cuh"

#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <unistd.h>

#include <tessera/checkpoint/device_memory.cuh>
#include <tessera/comm/threads.hpp>

#include "../support/comm_checks.hpp"

namespace {

namespace ts = tessera;
namespace cp = tessera::checkpoint;
using comm_checks::require;
using threads = ts::comm::threads;

// A folder that goes away.
struct folder {
  std::string path;
  folder() {
    const auto base = std::filesystem::temp_directory_path() / ("tessera_device_" + std::to_string(::getpid()));
    std::filesystem::remove_all(base);
    std::filesystem::create_directories(base);
    path = base.string();
  }
  ~folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
};

float value(int tensor, std::int64_t i) { return static_cast<float>((i * 7919 + tensor * 104729) % 1000003) * 0.25f; }

// Tensors: rows divided, columns divided (not contiguous on the device), the middle of three dimensions, a scalar, and
// one that all ranks have.
struct tensor {
  std::string name;
  ts::box whole;
  int dim;  // -1: replicated
};
const std::vector<tensor> tensors = {
    {"rows", ts::box::whole({37, 50}), 0},     {"columns", ts::box::whole({23, 64}), 1},
    {"middle", ts::box::whole({5, 12, 7}), 1}, {"scalar", ts::box::whole({1}), -1},
    {"long", ts::box::whole({70001}), 0},      {"same", ts::box::whole({11, 13}), -1}};

// What a rank has of a tensor.
ts::box part_of(const tensor& t, int rank, int ranks) {
  ts::box part = t.whole;
  if (t.dim < 0) return part;
  const std::int64_t extent = t.whole.size[t.dim], begin = extent * rank / ranks;
  part.offset[t.dim] = begin;
  part.size[t.dim] = extent * (rank + 1) / ranks - begin;
  return part;
}

// A rank's parts. `holes`: every row of a part is followed by 3 elements that are nobody's.
struct rank_tensors {
  std::vector<ts::box> parts;
  std::vector<std::array<std::int64_t, ts::max_box_rank>> strides;
  std::vector<std::vector<float>> host;

  rank_tensors(int rank, int ranks, bool holes) {
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      const ts::box part = part_of(tensors[t], rank, ranks);
      parts.push_back(part);
      std::array<std::int64_t, ts::max_box_rank> stride{};
      std::int64_t step = 1;
      for (int d = part.rank - 1; d >= 0; --d) {
        stride[static_cast<std::size_t>(d)] = step;
        step *= part.size[d] + (holes && d == part.rank - 1 ? 3 : 0);
      }
      strides.push_back(stride);
      host.emplace_back(static_cast<std::size_t>(step), -1.0f);
    }
  }
  template <class F>
  void each(F&& f) {  // f(element here, number in the whole tensor, tensor)
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      const ts::box &part = parts[t], &whole = tensors[t].whole;
      for (std::int64_t i = 0; i < part.volume(); ++i) {
        std::int64_t left = i, here = 0, number = 0, step = 1;
        for (int d = part.rank - 1; d >= 0; --d) {
          const std::int64_t k = left % part.size[d];
          left /= part.size[d];
          here += k * strides[t][static_cast<std::size_t>(d)];
          number += (part.offset[d] + k) * step;
          step *= whole.size[d];
        }
        f(host[t][static_cast<std::size_t>(here)], number, static_cast<int>(t));
      }
    }
  }
  void fill(int salt) {
    each([&](float& x, std::int64_t i, int t) { x = value(t + salt, i); });
  }
  int wrong(int salt) {
    int count = 0;
    each([&](float& x, std::int64_t i, int t) { count += x == value(t + salt, i) ? 0 : 1; });
    return count;
  }
  template <class T>
  auto pieces(const std::vector<T*>& data) const {
    std::vector<cp::basic_piece<std::conditional_t<std::is_const_v<T>, const void, void>>> list;
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      auto next = cp::piece_of(tensors[t].name, data[t], tensors[t].whole, parts[t], "test");
      next.strides = strides[t];
      list.push_back(next);
    }
    return list;
  }
};

// The same in device memory.
struct device_tensors {
  std::vector<std::unique_ptr<device_test::buffer<float>>> arrays;
  explicit device_tensors(const rank_tensors& host) {
    for (const auto& values : host.host) arrays.push_back(std::make_unique<device_test::buffer<float>>(values));
    device_test::synchronize();
  }
  template <class T>
  std::vector<T*> pointers() const {
    std::vector<T*> list;
    for (const auto& a : arrays) list.push_back(a->data());
    return list;
  }
  void fetch(rank_tensors& to) const {
    for (std::size_t t = 0; t < arrays.size(); ++t) to.host[t] = arrays[t]->get();
  }
};

template <class F>
void on_ranks(int ranks, F&& f) {
  threads::run(ranks, [&](threads& comm) {
    device_test::require(cudaSetDevice(0), "cudaSetDevice");
    f(comm);
  });
}

cp::save_plan plan_for(threads& comm, const rank_tensors& t, const std::vector<const float*>& pointers) {
  return cp::make_plan(comm, t.pieces(pointers), {.split_bytes = 4096, .block_bytes = cp::min_block_bytes});
}

TEST_CASE("what a GPU saves loads anywhere, and a GPU loads what anyone saved") {
  const folder f;
  for (const int savers : {1, 2, 3}) {
    for (const int loaders : {1, 2, 4}) {
      for (const bool holes : {false, true}) {
        CAPTURE(savers);
        CAPTURE(loaders);
        CAPTURE(holes);
        const cp::device_copy_options copies{.pinned_bytes = holes ? 5000 : 1 << 20};
        const int salt = 100 * savers + 10 * loaders;
        std::filesystem::remove_all(f.path);
        CHECK_NOTHROW(on_ranks(savers, [&](threads& comm) {
          rank_tensors t(comm.rank(), comm.size(), holes);
          t.fill(salt);
          const device_tensors d(t);
          const cudaStream_t stream = device_test::make_stream();
          const auto plan = plan_for(comm, t, d.pointers<const float>());
          cp::device_saver saver(comm, {.directory = f.path}, copies);
          saver.save(stream, plan, t.pieces(d.pointers<const float>()), {.step = 7});
          require(saver.copied() && !saver.pending(), "nothing is under way");
          // and what the host half saves
          std::vector<const float*> host;
          for (const auto& values : t.host) host.push_back(values.data());
          cp::saver host_saver(comm, {.directory = f.path});
          host_saver.save(plan, t.pieces(host), {.step = 8});
          device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
        }));
        CHECK_NOTHROW(on_ranks(loaders, [&](threads& comm) {
          rank_tensors t(comm.rank(), comm.size(), holes);
          const rank_tensors untouched = t;
          std::vector<float*> host;
          for (auto& values : t.host) host.push_back(values.data());
          const std::string step7 = f.path + "/" + cp::step_name(7);
          require(cp::load(comm, step7, t.pieces(host)).state.step == 7, "step");
          require(t.wrong(salt) == 0, "the host loads ", t.wrong(salt), " wrong elements of a GPU's checkpoint");
          for (const int step : {7, 8}) {
            rank_tensors got = untouched;
            const device_tensors d(got);
            const cudaStream_t stream = device_test::make_stream();
            const std::string path = f.path + "/" + cp::step_name(step);
            cp::load(stream, comm, path, got.pieces(d.pointers<float>()), {}, copies);
            d.fetch(got);
            require(got.wrong(salt) == 0, "a GPU loads ", got.wrong(salt), " wrong elements of step ", step);
            require(got.host == t.host, "what is nobody's has changed");
            device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
          }
        }));
      }
    }
  }
}

TEST_CASE("a save under way sees what the stream had written before, and nothing of what comes after wait_copied") {
  const folder f;
  CHECK_NOTHROW(on_ranks(2, [&](threads& comm) {
    rank_tensors t(comm.rank(), comm.size(), false);
    t.fill(1);
    const device_tensors d(t);
    const cudaStream_t stream = device_test::make_stream();
    const auto plan = plan_for(comm, t, d.pointers<const float>());
    cp::device_saver saver(comm, {.directory = f.path, .keep_last = 2}, {.pinned_bytes = 4096});
    for (int step = 1; step <= 3; ++step) {
      // The new values are on their way on the stream, not there yet.
      t.fill(step * 50);
      for (std::size_t i = 0; i < t.host.size(); ++i) {
        device_test::require(cudaMemcpyAsync(d.arrays[i]->data(), t.host[i].data(), t.host[i].size() * sizeof(float),
                                             cudaMemcpyHostToDevice, stream),
                             "copy");
      }
      saver.save_async(stream, plan, t.pieces(d.pointers<const float>()), {.step = step});
      require(saver.pending(), "a save is under way");
      saver.wait_copied();
      for (const auto& array : d.arrays) {
        device_test::require(cudaMemsetAsync(array->data(), 0xff, array->size() * sizeof(float), stream), "memset");
      }
      device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      require(saver.wait() == f.path + "/" + cp::step_name(step), "the folder");
      rank_tensors got(comm.rank(), comm.size(), false);
      const device_tensors target(got);
      const auto loaded = cp::resume(stream, comm, f.path, got.pieces(target.pointers<float>()));
      require(loaded.has_value() && loaded->state.step == step, "the last step is found");
      target.fetch(got);
      require(got.wrong(step * 50) == 0, "step ", step, " has ", got.wrong(step * 50), " wrong elements");
    }
    device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }));
}

TEST_CASE("a failure on one rank is the same error on all, and the next save goes on") {
  const folder f;
  CHECK_NOTHROW(on_ranks(2, [&](threads& comm) {
    rank_tensors t(comm.rank(), comm.size(), false);
    t.fill(1);
    const device_tensors d(t);
    const cudaStream_t stream = device_test::make_stream();
    const auto plan = plan_for(comm, t, d.pointers<const float>());
    bool fails = comm.rank() == 1;
    const auto observer = [&](const cp::io_event& e) {
      if (fails && e.kind == cp::io_kind::write) throw std::runtime_error("the disk is full");
    };
    cp::device_saver saver(comm, {.directory = f.path, .observer = observer});
    std::string text;
    saver.save_async(stream, plan, t.pieces(d.pointers<const float>()), {.step = 1});
    saver.wait_copied();
    try {
      saver.wait();
    } catch (const ts::checkpoint_error& e) {
      text = e.what();
    }
    require(text.find("rank 1: ") != std::string::npos && text.find("the disk is full") != std::string::npos, text);
    fails = false;
    saver.save(stream, plan, t.pieces(d.pointers<const float>()), {.step = 2});
    // pieces without data, on one rank
    auto wrong = t.pieces(d.pointers<const float>());
    if (comm.rank() == 0) wrong[0].data = nullptr;
    bool refused = false;
    try {
      saver.save_async(stream, plan, wrong, {.step = 3});
    } catch (const ts::checkpoint_error&) {
      refused = true;
    }
    require(refused && !saver.pending() && saver.copied(), "refused on every rank");
    device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }));
  threads::run(1, [&](threads& comm) {
    CHECK_THROWS_AS(cp::device_saver(comm, {.directory = f.path}, {.pinned_bytes = 100}), ts::invalid_argument);
  });
}

}  // namespace
