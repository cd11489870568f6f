// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Ranks of comm::nccl that fail, with one thread per GPU: what the others are told, how soon, and that all can start
// again. With one GPU the parts that need two are left out.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/nccl.cuh>
#include <tessera/comm/self.hpp>
#include <tessera/comm/threads.hpp>

#include "../support/comm_checks.hpp"
#include "../support/messages.hpp"

namespace {

namespace ts = tessera;
using comm_checks::require;
using device_test::num_gpus;
using device_test::on_ranks;
using device_test::rank_memory;
using nccl = ts::comm::nccl;
using staged = device_test::staged<nccl>;
using std::chrono::milliseconds;
using tessera_test::contains;
using clock_type = std::chrono::steady_clock;

struct outcome {
  std::string text;
  std::string phase;
  milliseconds took{0};
};

outcome observe(const std::function<void()>& f) {
  outcome result;
  const auto start = clock_type::now();
  try {
    f();
  } catch (const ts::comm_error& e) {
    result = {e.what(), e.phase(), {}};
  } catch (const std::exception& e) {
    result.text = std::string("not a comm_error: ") + e.what();
  }
  result.took = std::chrono::duration_cast<milliseconds>(clock_type::now() - start);
  return result;
}

TEST_CASE("a communicator that is given up says so on every call, its sub-communicators too") {
  rank_memory device;
  ts::comm::self<ts::space::host> bootstrap;
  nccl c = nccl::create(bootstrap);
  nccl part = c.split(0, 0);
  nccl copy = c;
  c.barrier(device.stream());
  c.wait(device.stream());
  part.fail("expert 300 of 256");
  for (nccl* each : {&part, &c, &copy}) {
    const outcome o = observe([&] { each->barrier(device.stream()); });
    CHECK(o.phase == "barrier");
    CHECK(contains(o.text, "rank 0 failed: expert 300 of 256"));
    CHECK(contains(o.text, "not usable any more"));
    CHECK(each->failed());
    CHECK(each->native() == nullptr);
    CHECK_THROWS_AS(each->check(), ts::comm_error);
    CHECK_THROWS_AS(each->wait(device.stream()), ts::comm_error);
    CHECK_THROWS_AS(each->split(0, 0), ts::comm_error);
  }
  nccl again = nccl::create(bootstrap);
  CHECK_NOTHROW(again.barrier(device.stream()));
  CHECK_NOTHROW(again.wait(device.stream()));
}

// All ranks but the last do `work`, which that one never calls; then all start again with a new communicator.
void check_absent_rank(const char* phase, bool warm, const std::function<void(nccl&, rank_memory&)>& work) {
  const int ranks = (std::min)(num_gpus(), 4);
  std::vector<outcome> outcomes(static_cast<std::size_t>(ranks));
  std::vector<outcome> later(static_cast<std::size_t>(ranks));
  CAPTURE(phase);
  CAPTURE(warm);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    rank_memory device;
    {
      nccl c = nccl::create(t, {.timeout = milliseconds(warm ? 20000 : 1000)});
      if (warm) {
        work(c, device);
        c.wait(device.stream());
      }
      t.barrier({});
      if (c.rank() + 1 < c.size()) {
        outcomes[static_cast<std::size_t>(t.rank())] = observe([&] {
          work(c, device);
          c.wait(device.stream(), milliseconds(1000));
        });
        later[static_cast<std::size_t>(t.rank())] = observe([&] { c.barrier(device.stream()); });
        require(c.failed(), "a survivor has given up");
        require(cudaStreamSynchronize(device.raw()) == cudaSuccess, "the stream ends and the context lives");
      }
      t.barrier({});
    }
    staged again(nccl::create(t), device);
    comm_checks::check_moves<std::uint8_t>(again);
  }));
  for (int r = 0; r + 1 < ranks; ++r) {
    const outcome& o = outcomes[static_cast<std::size_t>(r)];
    CHECK_MESSAGE(o.phase == phase, o.text);
    CHECK(contains(o.text, "rank " + std::to_string(r) + " in " + phase));
    CHECK(o.took < milliseconds(3000));
    CHECK(contains(later[static_cast<std::size_t>(r)].text, "not usable any more"));
  }
}

TEST_CASE("a rank that never calls becomes an error on the others within the timeout, and all start again") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  for (const bool warm : {true, false}) {
    check_absent_rank("all_reduce", warm, [](nccl& c, rank_memory& device) {
      auto* data = device.take<float>(100);
      c.all_reduce(device.stream(), static_cast<const float*>(data), data, 100);
    });
    check_absent_rank("exchange", warm, [](nccl& c, rank_memory& device) {
      // Everyone waits for a message of the last rank.
      auto* data = device.take<float>(100 * (c.size() + 1));
      const int last = c.size() - 1;
      std::vector<ts::transfer> sends;
      std::vector<ts::transfer> receives;
      for (int peer = 0; peer < c.size(); ++peer) {
        if ((peer == last) == (c.rank() == last)) continue;
        sends.push_back(ts::send_to(peer, data, 100));
        receives.push_back(ts::receive_from(peer, data + 100 * (peer + 1), 100));
      }
      c.exchange(device.stream(), sends, receives);
    });
  }
}

TEST_CASE("an engine's communicator is aborted after a failure where the engine allows it, and left alone otherwise") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  for (const bool may_abort : {false, true}) {
    CAPTURE(may_abort);
    outcome seen;
    CHECK_NOTHROW(on_ranks(2, [&](ts::comm::threads& t) {
      rank_memory device;
      auto* data = device.take<float>(100);
      ncclUniqueId id{};
      if (t.rank() == 0) require(ncclGetUniqueId(&id) == ncclSuccess, "ncclGetUniqueId");
      t.broadcast({}, &id, 1, 0);
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      ncclComm_t engine = nullptr;
      require(ncclCommInitRankConfig(&engine, 2, id, t.rank(), &config) == ncclSuccess, "ncclCommInitRankConfig");
      nccl c = nccl::wrap(engine, {.abort_wrapped = may_abort});
      c.all_reduce(device.stream(), static_cast<const float*>(data), data, 100);
      c.wait(device.stream());
      t.barrier({});
      if (t.rank() == 0) {
        seen = observe([&] {
          c.all_reduce(device.stream(), static_cast<const float*>(data), data, 100);
          c.wait(device.stream(), milliseconds(500));
        });
        require(c.failed() && c.native() == (may_abort ? nullptr : engine), "who has the communicator");
        if (!may_abort) require(ncclCommAbort(engine) == ncclSuccess, "the engine aborts");
        require(cudaStreamSynchronize(device.raw()) == cudaSuccess, "the stream ends");
      }
      t.barrier({});
      if (t.rank() == 1) require(ncclCommAbort(engine) == ncclSuccess, "the engine aborts");
      t.barrier({});
    }));
    CHECK_MESSAGE(seen.phase == "all_reduce", seen.text);
    CHECK(seen.took < milliseconds(3000));
  }
}

TEST_CASE("a rank that never comes to the creation becomes an error on the others") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  outcome seen;
  CHECK_NOTHROW(on_ranks(2, [&](ts::comm::threads& t) {
    // The last rank takes part in the bootstrap with a GPU of its own, and goes away.
    const auto gather = [&](const void* send, void* recv, std::size_t bytes) {
      t.all_gather({}, static_cast<const std::byte*>(send), static_cast<std::byte*>(recv),
                   static_cast<std::int64_t>(bytes));
      if (t.rank() == 1) throw std::runtime_error("gone");
    };
    const ts::comm::nccl_options options{.timeout = milliseconds(1000), .creation_timeout = milliseconds(1000)};
    if (t.rank() == 0) {
      seen = observe([&] { nccl::create(t.rank(), t.size(), gather, options); });
    } else {
      comm_checks::caught<std::runtime_error>([&] { nccl::create(t.rank(), t.size(), gather, options); });
    }
    t.barrier({});
  }));
  CHECK_MESSAGE(seen.phase == "create", seen.text);
  CHECK(seen.took < milliseconds(3000));
}

}  // namespace

#endif
