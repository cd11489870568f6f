// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// comm::symmetric with one thread per GPU: memory that peers write, flags over thousands of operations and in graphs,
// ranks that do not come and the way back, slots, collectives, refusals. With one GPU the parts that need two are left
// out.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/symmetric.cuh>
#include <tessera/comm/threads.hpp>

#include "../support/comm_checks.hpp"
#include "../support/messages.hpp"

namespace {

namespace ts = tessera;
namespace flags = tessera::detail::symmetric;
using comm_checks::require;
using device_test::num_gpus;
using device_test::rank_memory;
using std::chrono::milliseconds;
using tessera_test::contains;
using ts::comm::symmetric;
using ts::comm::symmetric_channel;
using ts::comm::symmetric_options;
using ts::comm::symmetric_step;
using ts::comm::symmetric_view;
using ts::comm::threads;
using clock_type = std::chrono::steady_clock;
using words = std::vector<std::uint32_t>;

// Kernels are loaded before GPUs wait for each other, and streams do not wait for each other by chance.
const int loading = setenv("CUDA_MODULE_LOADING", "EAGER", 1);
const int connections = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);

template <class F>
void on_ranks(F f) {
  CHECK_NOTHROW(device_test::on_ranks((std::min)(num_gpus(), 4), f));
}

bool one_gpu() {
  if (num_gpus() == 1) MESSAGE("needs 2 GPUs");
  return num_gpus() == 1;
}

symmetric_options options_of(int timeout_ms, int nccl_timeout_ms = 20000) {
  symmetric_options options;
  options.window_bytes = 64 * 1024;
  options.slots = 2;
  options.copy_streams = 2;
  options.timeout = milliseconds(timeout_ms);
  options.nccl.timeout = milliseconds(nccl_timeout_ms);
  return options;
}

__host__ __device__ constexpr std::uint32_t word_of(int from, int to, std::uint32_t generation, int i) {
  std::uint32_t x = static_cast<std::uint32_t>((i * 16 + from) * 16 + to) * 0x9e3779b9u + generation * 0x85ebca6bu;
  x = (x ^ (x >> 15)) * 0x2c1b3c6du;
  return x ^ (x >> 12);
}

// One rank's part of a chain of operations: in each it writes a row to every rank, and looks at what came from them.
constexpr int row_words = 600;
struct chain_task {
  symmetric_view view;
  std::uint32_t* rows;   // [size, row_words] in the window: row r is written by rank r
  std::uint32_t* wrong;  // local: words that are not as they should be; the operation of the first
};

// One block in four spins, for up to some 20 microseconds, a different time on every rank.
__device__ void delay(const symmetric_view& view, std::uint32_t generation, int place) {
  const std::uint32_t chance = word_of(view.rank, place, generation, static_cast<int>(blockIdx.x));
  if (chance % 4 != 0) return;
  const long long start = clock64();
  while (clock64() - start < static_cast<long long>((chance >> 2) % 40000)) {
  }
}

__global__ void pass_kernel(const __grid_constant__ chain_task task) {
  const symmetric_view& view = task.view;
  if (flags::failed(view)) return;
  const std::uint32_t generation = flags::next_generation(view);
  delay(view, generation, 0);
  if (blockIdx.x == 0 && threadIdx.x < 32) flags::announce(view, generation);
  if (!flags::all_entered(view, generation)) return;
  delay(view, generation, 1);
  const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  for (int to = 0; to < view.size; ++to) {
    std::uint32_t* const row = flags::at_peer(view, task.rows + view.rank * row_words, to);
    for (int i = first; i < row_words; i += static_cast<int>(gridDim.x * blockDim.x))
      row[i] = word_of(view.rank, to, generation, i);
  }
  flags::leave(view, generation);
}

__global__ void take_kernel(const __grid_constant__ chain_task task) {
  const symmetric_view& view = task.view;
  if (flags::failed(view)) return;
  const std::uint32_t generation = flags::current_generation(view);
  const int r = static_cast<int>(threadIdx.x);
  bool come = true;
  if (r < view.size) come = flags::await(view, view.arrived + r, generation, r, symmetric_step::arrival);
  if (__syncthreads_and(come) == 0) return;
  delay(view, generation, 2);
  for (int i = r; i < view.size * row_words; i += static_cast<int>(blockDim.x)) {
    if (task.rows[i] == word_of(i / row_words, view.rank, generation, i % row_words)) continue;
    atomicAdd(task.wrong, 1u);
    atomicCAS(task.wrong + 1, 0u, generation);
  }
}

__global__ void spin_kernel(std::uint64_t nanoseconds) {
  const std::uint64_t start = flags::nanoseconds();
  while (flags::nanoseconds() - start < nanoseconds) {
  }
}

__global__ void write_everywhere_kernel(const __grid_constant__ symmetric_view view, std::size_t offset, int count) {
  for (int to = 0; to < view.size; ++to) {
    auto* const row = reinterpret_cast<std::uint32_t*>(view.peer[to] + offset) + view.rank * count;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
      row[i] = word_of(view.rank, to, 0, i);
  }
}

words read(rank_memory& memory, const std::uint32_t* from, int count) {
  words values(static_cast<std::size_t>(count));
  memory.get(values.data(), from, count);
  return values;
}

class chain {
 public:
  // Collective as `allocate` is. Works on the stream of `memory`, which outlives it.
  chain(symmetric comm, rank_memory& memory) : comm_(std::move(comm)), memory_(memory) {
    task_.view = comm_.view(symmetric_channel::rows);
    task_.rows = reinterpret_cast<std::uint32_t*>(comm_.allocate(sizeof(std::uint32_t) * row_words * comm_.size()));
    task_.wrong = memory_.take<std::uint32_t>(2);
    require(cudaMemsetAsync(task_.wrong, 0, 8, stream()) == cudaSuccess, "cudaMemsetAsync");
    require(cudaStreamSynchronize(stream()) == cudaSuccess, "cudaStreamSynchronize");
  }
  void enqueue(int operations) {
    for (int i = 0; i < operations; ++i) {
      pass_kernel<<<3, 96, 0, stream()>>>(task_);
      look();
    }
    require(cudaGetLastError() == cudaSuccess, "kernels of the chain");
  }
  // Looks once more at what the last operation brought.
  void look() { take_kernel<<<1, 128, 0, stream()>>>(task_); }
  void finish(const std::string& what, std::uint32_t last_operation) {
    comm_.wait(stream());
    expect_state(what, last_operation);
  }
  void expect_state(const std::string& what, std::uint32_t last_operation) {
    const words wrong = read(memory_, task_.wrong, 2);
    require(wrong[0] == 0, what, ": ", wrong[0], " words are wrong, the first in operation ", wrong[1]);
    const words counts = read(memory_, task_.view.generation, 8);  // tickets are the last four
    require(counts[0] == last_operation, what, ": operation ", counts[0], " was the last, not ", last_operation);
    require(words(counts.end() - 4, counts.end()) == words(4, 0), what, ": blocks are still counted");
  }
  cudaStream_t stream() const { return memory_.raw(); }

 private:
  symmetric comm_;
  rank_memory& memory_;
  chain_task task_{};
};

struct outcome {
  std::string text = "nothing was thrown", phase;
  int rank = -2, peer = -2;
  milliseconds took{0};
};

// What `f` throws, which must be a comm_error.
template <class F>
outcome observe(F f) {
  outcome o;
  const auto start = clock_type::now();
  try {
    f();
  } catch (const ts::comm_error& e) {
    o = {e.what(), e.phase(), e.rank(), e.peer()};
  }
  o.took = std::chrono::duration_cast<milliseconds>(clock_type::now() - start);
  return o;
}

std::string name_of(int rank) { return "rank " + std::to_string(rank); }

template <class Exception, class F>
void expect_refused(const std::string& part, F f) {
  const std::string text = comm_checks::caught<Exception>(f).what();
  require(contains(text, part), "'", part, "' is missing: ", text);
}

// What a wait of `me` for `peer`, ranks of the world, must have come to with a timeout of 300 ms.
void expect_failure(const outcome& o, int me, int peer, const std::string& missing) {
  require(o.phase == "dispatch of rows" && o.rank == me && o.peer == peer, o.text);
  require(contains(o.text, name_of(me) + " in dispatch of rows: " + name_of(peer) + " " + missing), o.text);
  require(contains(o.text, "within 300 ms"), o.text);
  require(o.took > milliseconds(250) && o.took < milliseconds(3000), "it took ", o.took.count(), " ms");
}

void expect_busy(cudaStream_t stream, const char* what) {
  require(cudaStreamQuery(stream) == cudaErrorNotReady, what);
  static_cast<void>(cudaGetLastError());  // it counts as one
}

TEST_CASE("every rank reaches the memory of every rank at the same offset") {
  on_ranks([](threads& t) {
    rank_memory memory;
    symmetric comm = symmetric::create(t, options_of(20000));
    require(comm.direct() && comm.reason().empty(), comm.reason());
    require(comm.rank() == t.rank() && comm.size() == t.size() && comm.slot() == 0, "what it is");
    require(comm.capacity_bytes() == 65536 && comm.used_bytes() == 0, "nothing is used");

    std::byte* const first = comm.allocate(1);
    require(comm.used_bytes() == 1, "used_bytes = ", comm.used_bytes());
    std::byte* const second = comm.allocate(3000);
    require(second == first + 1024 && comm.used_bytes() == 4024, "used_bytes = ", comm.used_bytes());
    require(reinterpret_cast<std::uintptr_t>(first) % 1024 == 0 && comm.offset_of(first) % 1024 == 0, "alignment");
    require(comm.offset_of(second + 5) == comm.offset_of(first) + 1029, "offset_of");
    const std::byte* const begin = first - comm.offset_of(first);
    require(comm.contains(begin) && !comm.contains(begin - 1), "where the window begins");
    require(comm.contains(first + 65535) && !comm.contains(first + 65536), "where it ends");
    require(!comm.contains(nullptr) && !comm.contains(memory.take<char>(1)), "what is not in it");
    expect_refused<ts::invalid_argument>("is not in the window", [&] { comm.offset_of(begin - 1); });
    expect_refused<ts::invalid_argument>("61441 bytes are asked for, 61440 of window_bytes = 65536 are left",
                                         [&] { comm.allocate(61441); });
    expect_refused<ts::invalid_argument>("61440 of", [&] { comm.allocate(~std::size_t{0}); });
    require(comm.used_bytes() == 4024, "a refusal takes nothing");
    require(comm.allocate(61440) == first + 4096 && comm.used_bytes() == 65536, "all of it");
    expect_refused<ts::invalid_argument>("0 of window_bytes = 65536", [&] { comm.allocate(1); });
    comm.release_all();
    require(comm.used_bytes() == 0 && comm.allocate(1024) == first, "it begins anew");

    const int count = 3000;
    std::byte* const array = comm.allocate(static_cast<std::size_t>(count * t.size()) * 4);
    const symmetric_view view = comm.view(symmetric_channel::tables);
    write_everywhere_kernel<<<1, 256, 0, memory.raw()>>>(view, comm.offset_of(array), count);
    comm.barrier(memory.stream());
    comm.wait(memory.stream());
    const words found = read(memory, reinterpret_cast<const std::uint32_t*>(array), count * t.size());
    for (int i = 0; i < count * t.size(); ++i) {
      require(found[static_cast<std::size_t>(i)] == word_of(i / count, t.rank(), 0, i % count), name_of(i / count),
              " has not written word ", i % count);
    }
    t.barrier({});
  });
}

TEST_CASE("5000 operations with ranks that are late at random, and 100 replays of a graph of ten") {
  on_ranks([](threads& t) {
    rank_memory memory;
    symmetric comm = symmetric::create(t, options_of(20000));
    chain c(comm, memory);
    t.barrier({});
    c.enqueue(5000);
    c.finish("one after the other", 5000);
    cudaGraphExec_t graph = device_test::capture(c.stream(), [&] { c.enqueue(10); });
    for (int i = 0; i < 100; ++i) require(cudaGraphLaunch(graph, c.stream()) == cudaSuccess, "cudaGraphLaunch");
    c.finish("graphs", 6000);
    require(cudaGraphExecDestroy(graph) == cudaSuccess, "cudaGraphExecDestroy");
    c.enqueue(20);
    c.finish("after the graphs", 6020);
    t.barrier({});
  });
}

TEST_CASE("a rank that does not come is named by the others, and all go on after reset") {
  if (one_gpu()) return;
  on_ranks([](threads& t) {
    rank_memory memory;
    symmetric comm = symmetric::create(t, options_of(300, 5000));
    chain c(comm, memory);
    const int me = t.rank();
    const int last = t.size() - 1;
    t.barrier({});
    c.enqueue(20);
    c.finish("before", 20);
    require(!comm.failure(), "nothing has failed yet");
    t.barrier({});
    if (me != last) {
      c.enqueue(3);
      expect_failure(observe([&] { comm.wait(c.stream()); }), me, last, "has not come to operation 21 of its slot");
      const auto seen = comm.failure();
      require(seen && seen->rank == me && seen->peer == last && seen->channel == symmetric_channel::rows &&
                  seen->step == symmetric_step::entry && seen->generation == 21,
              "what is written down");
      c.enqueue(50);
      const outcome later = observe([&] { comm.wait(c.stream()); });
      require(later.peer == last && later.took < milliseconds(150), "later ones took ", later.took.count(), " ms");
      require(observe([&] { comm.check(); }).peer == last && !comm.failed(), "check; NCCL is in order");
      c.expect_state("nothing was done", 20);
    }
    t.barrier({});
    if (me != last) {
      const outcome o = observe([&] { comm.reset(c.stream()); });
      require(o.phase == "reset" && o.rank == me && o.peer == last && contains(o.text, name_of(last) + " has not come"),
              o.text);
      require(comm.failure().has_value(), "nothing has changed");
    }
    t.barrier({});
    if (me == last) {  // the others have announced themselves, and given up
      c.look();
      c.finish("nobody writes to a rank that has not come", 20);
      c.enqueue(1);
      const outcome o = observe([&] { comm.wait(c.stream()); });
      require(o.peer >= 0 && o.peer < last, o.text);
      expect_failure(o, me, o.peer, "has not sent its part of operation 21 of its slot");
    }
    comm.reset(c.stream());
    require(!comm.failure(), "a reset forgets");
    comm.check();
    c.enqueue(200);
    c.finish("after the reset", 200);
    t.barrier({});
  });
}

TEST_CASE("a reset that ranks miss in turns can still be done by all") {
  if (one_gpu()) return;
  on_ranks([](threads& t) {
    rank_memory memory;
    symmetric comm = symmetric::create(t, options_of(1000, 4000));
    chain c(comm, memory);
    const int last = t.size() - 1;
    for (const bool turn_of_last : {false, true}) {
      t.barrier({});
      if ((t.rank() == last) != turn_of_last) continue;
      const outcome o = observe([&] { comm.reset(c.stream()); });
      require(o.phase == "reset" && (turn_of_last ? o.peer < last : o.peer == last), o.text);
    }
    t.barrier({});
    comm.reset(c.stream());
    c.enqueue(200);
    c.finish("after the reset", 200);
    t.barrier({});
  });
}

TEST_CASE("check and failure do not wait, and a reset without failure does no harm") {
  on_ranks([](threads& t) {
    rank_memory memory;
    symmetric comm = symmetric::create(t, options_of(20000));
    chain c(comm, memory);
    require(!comm.failure(), "nothing has failed at first");
    t.barrier({});
    spin_kernel<<<1, 1, 0, c.stream()>>>(500'000'000);
    c.enqueue(20);
    const auto start = clock_type::now();
    comm.check();
    require(!comm.failure(), "nothing has failed");
    require(clock_type::now() - start < milliseconds(200), "check has waited");
    expect_busy(c.stream(), "the stream is done already");
    comm.reset(c.stream());  // waits for the stream
    require(!comm.failure(), "nor after the reset");
    c.expect_state("after the reset", 0);
    c.enqueue(30);
    c.finish("again", 30);
    t.barrier({});
  });
}

TEST_CASE("an operation of one slot that is held up leaves the other slot alone") {
  on_ranks([](threads& t) {
    rank_memory memory;
    rank_memory beside;
    symmetric comm = symmetric::create(t, options_of(20000));
    symmetric other = comm.on_slot(1);
    require(other.slot() == 1 && comm.slot() == 0 && other.contains(comm.allocate(1)), "a handle of the same window");
    require(other.side_stream().get() != comm.side_stream().get(), "a slot has a side stream of its own");
    require(comm.copy_streams() == 2 && other.copy_stream(0).get() != comm.copy_stream(0).get() &&
                comm.copy_stream(0).get() != comm.copy_stream(1).get(),
            "and streams of copies");
    chain c(comm, memory);
    chain d(other, beside);
    t.barrier({});
    if (t.rank() != 0) d.enqueue(2);
    c.enqueue(200);
    c.finish("slot 0", 200);
    if (t.rank() != 0) expect_busy(d.stream(), "slot 1 has not waited for rank 0");
    t.barrier({});
    if (t.rank() == 0) d.enqueue(2);
    d.finish("slot 1", 2);
    c.enqueue(300);
    d.enqueue(300);
    c.finish("slot 0 beside slot 1", 500);
    d.finish("slot 1 beside slot 0", 302);
    const ts::device_stream streams[] = {c.stream(), d.stream()};
    comm.reset(streams);
    d.enqueue(20);
    d.finish("slot 1 after the reset", 20);
    c.expect_state("slot 0 after the reset", 0);
    t.barrier({});
  });
}

TEST_CASE("collectives go through it, and a part of the ranks has a window of its own") {
  on_ranks([](threads& t) {
    rank_memory memory;
    rank_memory of_part;
    symmetric comm = symmetric::create(t, options_of(20000));
    device_test::staged<symmetric> host(comm, memory);
    comm_checks::check_reductions<std::int32_t>(host);
    comm_checks::check_moves<std::uint8_t>(host);
    memory.clear();

    const int size = t.size();
    auto* const sum = reinterpret_cast<std::int32_t*>(comm.allocate(4));  // memory of the window is like any other
    std::int32_t value = 10 + t.rank();
    comm.all_reduce(memory.stream(), static_cast<const std::int32_t*>(memory.put(&value, 1)), sum, 1);
    comm.wait(memory.stream());
    memory.get(&value, sum, 1);
    require(value == 10 * size + size * (size - 1) / 2, "the sum is ", value);

    chain whole(comm, memory);
    auto options = options_of(300);
    options.window_bytes = 32 * 1024;
    symmetric part = comm.split(t.rank() / 2, -t.rank(), options);  // pairs, the other way round
    require(part.direct() && part.size() == (std::min)(2, size - t.rank() / 2 * 2), "size ", part.size());
    require(part.capacity_bytes() == 32 * 1024 && comm.split(t.rank(), 0).capacity_bytes() == 64 * 1024, "options");
    const std::size_t used = comm.used_bytes();
    chain pair(part, of_part);
    require(comm.used_bytes() == used && !comm.contains(part.allocate(1)), "a window of its own");
    t.barrier({});
    pair.enqueue(200);
    whole.enqueue(200);
    pair.finish("pair", 200);
    whole.finish("whole", 200);
    t.barrier({});
    if (part.size() == 2 && part.rank() == 0) {  // errors have ranks of the world, `failure` those of the part
      pair.enqueue(1);
      expect_failure(observe([&] { part.wait(pair.stream()); }), t.rank(), t.rank() - 1,
                     "has not come to operation 201");
      require(part.failure()->rank == 0 && part.failure()->peer == 1, "failure");
    }
    require(!comm.failure(), "the whole is in order");
    whole.enqueue(20);
    whole.finish("whole, beside a part that failed", 220);
    part.reset(pair.stream());
    pair.enqueue(20);
    pair.finish("pair after the reset", 20);
    t.barrier({});
  });
}

TEST_CASE("wrong options are refused by all ranks, and a rank that does not share memory is named") {
  on_ranks([](threads& t) {
    rank_memory memory;
    auto over = ts::comm::nccl::create(t);
    const int last = t.size() - 1;
    const bool is_last = t.rank() == last;
    const auto refused = [&](const std::string& part, auto change, int timeout_ms = 1000) {
      symmetric_options options = options_of(timeout_ms);
      change(options);
      expect_refused<ts::invalid_argument>(part, [&] { symmetric::create(over, options); });
    };
    refused("rank 0: window_bytes = 0", [](symmetric_options& o) { o.window_bytes = 0; });
    refused(name_of(last) + ": slots = 9", [&](symmetric_options& o) { o.slots = is_last ? 9 : 2; });
    refused(name_of(last) + ": num_sms = -1", [&](symmetric_options& o) { o.num_sms = is_last ? -1 : 4; });
    refused(name_of(last) + ": copy_streams = 9", [&](symmetric_options& o) { o.copy_streams = is_last ? 9 : 2; });
    refused(
        name_of(last) + ": the timeout is 0 ms", [](symmetric_options&) {}, is_last ? 0 : 1000);
    if (last > 0) {
      refused("window_bytes = 65536 and slots = 2, " + name_of(last) + " for 4096 and 2",
              [&](symmetric_options& o) { o.window_bytes = is_last ? 4096 : 65536; });
      refused(name_of(last) + " for 65536 and 3", [&](symmetric_options& o) { o.slots = is_last ? 3 : 2; });
      refused("require_direct differs", [&](symmetric_options& o) { o.require_direct = is_last; });
      symmetric_options options = options_of(20000);
      options.allow_direct = !is_last;
      symmetric apart = symmetric::create(over, options);
      require(!apart.direct() && contains(apart.reason(), name_of(last)), apart.reason());
      expect_refused<ts::invalid_argument>(apart.reason(), [&] { apart.view(symmetric_channel::rows); });
      require(apart.contains(apart.allocate(65536)), "it has memory all the same");
      apart.reset(memory.stream());
      options.require_direct = true;
      expect_refused<ts::nccl_error>(name_of(last), [&] { symmetric::create(over, options); });
    }
    symmetric comm = symmetric::create(over, options_of(20000));
    for (const int slot : {-1, 2}) {
      expect_refused<ts::invalid_argument>(std::to_string(slot) + " of 2 slots", [&] { comm.on_slot(slot); });
    }
    expect_refused<ts::invalid_argument>("num_sms = -1", [&] { comm.set_num_sms(-1); });
    chain c(comm.on_slot(1), memory);
    c.enqueue(20);
    c.finish("after all that", 20);
    t.barrier({});
  });
}

}  // namespace

#endif
