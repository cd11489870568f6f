// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Sharded state in device memory against the host half, step by step, on as many GPUs as there are (one thread each):
// gathers, ordered sums, divisions and norms bit for bit, AdamW within rounding. With one GPU the parts that need two
// are left out. Without a GPU or without NCCL it says so and exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/nccl.cuh>
#include <tessera/comm/self.cuh>
#include <tessera/comm/threads.hpp>
#include <tessera/shard/fully_sharded.cuh>
#include <tessera/shard/shard.hpp>

#include "../support/comm_checks.hpp"
#include "stay.cuh"

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;
using comm_checks::require;
using comm_checks::same_bits;
using device_test::num_gpus;
using device_test::on_ranks;
using nccl = ts::comm::nccl;
using threads = ts::comm::threads;
using self = ts::comm::self<ts::space::device>;

// Kernels are loaded before GPUs wait for each other, and streams do not wait for each other by chance.
const int loading = setenv("CUDA_MODULE_LOADING", "EAGER", 1);
const int connections = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);

template <class T>
std::vector<T> fetch(cudaStream_t stream, const T* from, std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  if (count > 0) {
    device_test::require(
        cudaMemcpyAsync(values.data(), from, values.size() * sizeof(T), cudaMemcpyDeviceToHost, stream), "copy");
  }
  device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return values;
}

template <class T>
void send(cudaStream_t stream, T* to, const std::vector<T>& values) {
  if (values.empty()) return;
  device_test::require(cudaMemcpyAsync(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream),
                       "copy");
}

// Any number that looks random.
double noise(std::int64_t a, std::int64_t b) {
  std::uint64_t x = static_cast<std::uint64_t>(a) * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(b + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((x ^ (x >> 31)) >> 11) / 9007199254740992.0 * 2.0 - 1.0;
}

template <class P, class M, class R, class Comm>
struct device_model {
  sh::memory_sizes sizes;
  device_test::buffer<std::byte> state, step;
  sh::fully_sharded<P, M, R, Comm> model;

  static sh::memory_sizes sizes_of(const std::vector<sh::group<Comm>>& groups, const sh::options& choices) {
    std::vector<sh::group_shape> shapes;
    for (const auto& g : groups) shapes.push_back(sh::shape_of(g));
    return sh::memory_of<P, M, R, ts::space::device>(shapes, choices);
  }
  device_model(const std::vector<sh::group<Comm>>& groups, const sh::options& choices)
      : sizes(sizes_of(groups, choices)),
        state(sizes.state()),
        step(sizes.step()),
        model(groups, choices, (state.fill(0), ts::state_memory(state.data(), sizes.state())),
              sh::step_memory(step.data(), sizes.step())) {}
};

template <class P, class M, class R>
struct host_model {
  ts::host_buffer state, step;
  sh::fully_sharded<P, M, R, threads> model;

  static sh::memory_sizes sizes_of(const std::vector<sh::group<threads>>& groups, const sh::options& choices) {
    std::vector<sh::group_shape> shapes;
    for (const auto& g : groups) shapes.push_back(sh::shape_of(g));
    return sh::memory_of<P, M, R>(shapes, choices);
  }
  host_model(const std::vector<sh::group<threads>>& groups, const sh::options& choices)
      : state(sizes_of(groups, choices).state()),
        step(sizes_of(groups, choices).step()),
        model(groups, choices, ts::state_memory(state), sh::step_memory(step)) {}
};

// Shapes that divide evenly and not, along both dimensions, smaller than the ranks and larger than a tile.
std::vector<sh::parameter> odd_parameters(int group) {
  return {{.name = "a", .whole = ts::box::whole({6 + group, 5})},
          {.name = "b", .whole = ts::box::whole({3, 24}), .dim = 1, .decays = false},
          {.name = "c", .whole = ts::box::whole({1})},
          {.name = "d", .whole = ts::box::whole({70, 64})},
          {.name = "e", .whole = ts::box::whole({129, 128}), .dim = 1}};
}

struct plan {
  int shard_ranks = 1;
  int replicas = 1;
  int prefetch = 1;
  bool background = true;
  int micro_batches = 1;
  enum { reduce_all, hold_all_reduce, hold_all } accumulation = reduce_all;
};

std::int64_t chunks_of(bool keeps, int world_rank) { return keeps ? 1 + world_rank % 3 : 1; }

template <class Comm>
std::vector<sh::group<Comm>> make_groups(const plan& p, bool keeps_chunks, int world_rank, Comm* ranks, Comm* replicas,
                                         Comm* gather) {
  std::vector<sh::group<Comm>> groups;
  for (int g = 0; g < 4; ++g) {
    sh::group<Comm> next{.name = "group " + std::to_string(g),
                         .parameters = g == 2 ? std::vector<sh::parameter>{} : odd_parameters(g),
                         .ranks = ranks,
                         .replicas = p.replicas > 1 ? replicas : nullptr,
                         .gather = p.background ? gather : nullptr,
                         .chunks = chunks_of(keeps_chunks, world_rank),
                         .max_chunks = keeps_chunks ? 3 : 1,
                         .reshard_after_forward = g != 1};
    for (int r = 0; r < p.shard_ranks * p.replicas; ++r) next.chunks_of_ranks.push_back(chunks_of(keeps_chunks, r));
    groups.push_back(next);
  }
  return groups;
}

// The device half and the host half side by side. `exact`: sums have the same bits whatever is added; without it small
// integers are.
template <class P, class M, class R>
struct halves {
  using S = typename P::storage;
  using A = typename P::accumulate;
  using G = typename P::gradient;

  plan p;
  bool exact;
  int rank;
  threads host_ranks, host_replicas;
  nccl ranks, replicas, gather;
  host_model<P, M, R> host;
  device_model<P, M, R, nccl> device;
  sh::fully_sharded<P, M, R, threads>& h = host.model;
  sh::fully_sharded<P, M, R, nccl>& d = device.model;
  cudaStream_t stream = device_test::make_stream();

  halves(threads& t, nccl& c, const plan& how, bool exact_sums)
      : p(how),
        exact(exact_sums),
        rank(t.rank()),
        host_ranks(t.split(rank / p.shard_ranks, rank)),
        host_replicas(t.split(rank % p.shard_ranks, rank)),
        ranks(c.split(rank / p.shard_ranks, rank)),
        replicas(c.split(rank % p.shard_ranks, rank)),
        gather(ranks.split(0, ranks.rank())),
        host(make_groups<threads>(foreground(how), R::keeps_chunks, rank, &host_ranks, &host_replicas, nullptr),
             choices(how)),
        device(make_groups<nccl>(p, R::keeps_chunks, rank, &ranks, &replicas, &gather), choices(how)) {}
  halves(const halves&) = delete;
  halves& operator=(const halves&) = delete;

  static plan foreground(plan how) {
    how.background = false;
    return how;
  }
  static sh::options choices(const plan& how) {
    return {.prefetch = how.prefetch, .accumulate_unsharded = how.accumulation == plan::hold_all};
  }

  // `body(g, i)` for every parameter.
  template <class F>
  void each(F&& body) {
    for (int g = 0; g < h.num_groups(); ++g) {
      for (int i = 0; i < h.layout(g).num_parameters(); ++i) body(g, i);
    }
  }

  void set_parameters() {
    each([&](int g, int i) {
      std::vector<A> whole;
      for (std::int64_t k = 0; k < h.layout(g).elements(i); ++k) whole.push_back(static_cast<A>(noise(10 * g + i, k)));
      h.set(g, i, whole);
      d.set(stream, g, i, whole);
    });
  }

  // Forward of both, with the same parameters: the same bits at first, and near each other after AdamW.
  void check_forward(int step) {
    std::vector<std::vector<S>> seen;
    h.forward([&](int g) {
      for (int i = 0; i < h.layout(g).num_parameters(); ++i) {
        seen.emplace_back(h.full(g, i).begin(), h.full(g, i).end());
      }
    });
    std::size_t next = 0;
    d.forward(stream, [&](int g) {
      for (int i = 0; i < d.layout(g).num_parameters(); ++i, ++next) {
        const auto whole = fetch(stream, d.full(g, i).data(), d.layout(g).elements(i));
        require(reinterpret_cast<std::uintptr_t>(d.full(g, i).data()) % ts::memory_alignment == 0, "alignment");
        if (step == 1) {
          require(same_bits(whole, seen[next]), "group ", g, " parameter ", i, " is not gathered as it was set");
        } else {
          for (std::size_t k = 0; k < whole.size(); ++k) {
            const auto a = static_cast<double>(whole[k]), b = static_cast<double>(seen[next][k]);
            const double unit = sizeof(S) == 2 ? 1.0 / 128 : 1e-6, slack = sizeof(S) == 2 ? 1e-3 : 1e-5;
            require(std::abs(a - b) <= unit * std::abs(b) + slack, "step ", step, " group ", g, " parameter ", i,
                    " element ", k, ": ", a, " on the device, ", b, " on the host");
          }
        }
      }
    });
  }

  // What this rank adds to a gradient. Held micro-batches write once and add; contributions do not depend on the
  // parameters.
  std::vector<G> contribution(int step, int micro, int g, int i, std::int64_t chunk) const {
    std::vector<G> values;
    const std::int64_t seed = ((((step * 4 + micro) * 8 + rank) * 4 + chunk) * 8 + g) * 8 + i;
    const std::int64_t count = h.layout(g).elements(i);
    for (int m = p.accumulation == plan::hold_all ? 0 : micro; m <= micro; ++m) {
      for (std::int64_t k = 0; k < count; ++k) {
        const double x = noise(seed + 100000 * m, k);
        const double value = exact ? x : std::round(x * 16);
        if (static_cast<std::int64_t>(values.size()) < count) {
          values.push_back(sh::detail::to_element<G>(value));
        } else {
          auto& v = values[static_cast<std::size_t>(k)];
          v = sh::detail::to_element<G>(static_cast<double>(v) + value);
        }
      }
    }
    return values;
  }

  void backward(int step, int micro) {
    h.backward([&](int g) {
      for (int i = 0; i < h.layout(g).num_parameters(); ++i) {
        for (std::int64_t chunk = 0; chunk < chunks_of(R::keeps_chunks, rank); ++chunk) {
          const auto values = contribution(step, micro, g, i, chunk);
          std::copy(values.begin(), values.end(), h.full_gradient(g, i, chunk).begin());
        }
      }
    });
    std::vector<std::vector<G>> alive;  // until the copies are done
    d.backward(stream, [&](int g) {
      for (int i = 0; i < d.layout(g).num_parameters(); ++i) {
        for (std::int64_t chunk = 0; chunk < chunks_of(R::keeps_chunks, rank); ++chunk) {
          alive.push_back(contribution(step, micro, g, i, chunk));
          send(stream, d.full_gradient(g, i, chunk).data(), alive.back());
        }
      }
    });
    ranks.wait(stream);
  }

  void check_micro_batch(int step, int micro) {
    const bool last = micro + 1 == p.micro_batches;
    const auto choose = [&](auto& model) {
      model.set_requires_all_reduce(p.accumulation != plan::hold_all_reduce || last);
      if (p.accumulation == plan::hold_all) model.set_requires_gradient_sync(last);
    };
    choose(h);
    choose(d);
    check_forward(step);
    backward(step, micro);
  }

  void check_gradients(int step, const char* when) {
    d.join(stream);
    each([&](int g, int i) {
      const auto local = d.local(g, i);
      require(local.count == h.local(g, i).count, "count");
      const std::span expected(h.local(g, i).gradient, static_cast<std::size_t>(local.count));
      require(same_bits(fetch(stream, local.gradient, local.count), expected), "step ", step, " group ", g,
              " parameter ", i, ": the gradient ", when, " has other bits than the host's");
    });
  }

  // The norm and AdamW's step with it.
  void check_step(int step) {
    const double expected = h.gradient_norm();
    const double max_norm = step == 2 ? 0.0 : expected * 0.7;
    const double* norm = d.gradient_norm(stream, max_norm);
    require(fetch(stream, norm, 1)[0] == expected && d.wait_for_norm(stream) == expected, "step ", step, ": norm ",
            fetch(stream, norm, 1)[0], " on the device, ", expected, " on the host");
    const auto control = fetch(stream, d.control(), 1)[0];
    require(control.scale == sh::clip_factor(expected, max_norm), "step ", step, ": factor ", control.scale);
    const sh::adamw_options coefficients{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1};
    h.step(coefficients, step, 1e-2, sh::clip_factor(expected, max_norm));
    d.step(stream, coefficients, step, 1e-2);
    require(fetch(stream, d.control(), 1)[0].step == step, "the kernel counts");
    each([&](int g, int i) {
      const auto a = fetch(stream, d.local(g, i).master, d.local(g, i).count);
      for (std::size_t k = 0; k < a.size(); ++k) {
        const auto b = static_cast<double>(h.local(g, i).master[k]);
        const double slack = sizeof(M) == 2 ? 1e-2 : 1e-4;  // bf16 moments may be rounded to different sides
        require(std::abs(static_cast<double>(a[k]) - b) <= slack * 1e-2 * step + 1e-6 * std::abs(b), "step ", step,
                " group ", g, " parameter ", i, " element ", k, ": master ", static_cast<double>(a[k]),
                " on the device, ", b, " on the host");
      }
    });
  }
};

// Three steps of both halves.
template <class P, class M, class R>
void compare_halves(threads& t, nccl& c, const plan& p, bool exact) {
  halves<P, M, R> both(t, c, p, exact);
  t.barrier({});
  both.set_parameters();
  for (int step = 1; step <= 3; ++step) {
    for (int micro = 0; micro < p.micro_batches; ++micro) both.check_micro_batch(step, micro);
    both.check_gradients(step, "summed");
    both.h.divide_gradients(37 * step);
    both.d.divide_gradients(both.stream, 37 * step);
    both.check_gradients(step, "divided");
    both.check_step(step);
  }
  both.ranks.wait(both.stream);
  t.barrier({});
  device_test::require(cudaStreamDestroy(both.stream), "cudaStreamDestroy");
}

std::vector<plan> plans_for(int ranks) {
  std::vector<plan> plans{{.shard_ranks = ranks},
                          {.shard_ranks = ranks, .prefetch = 0},
                          {.shard_ranks = ranks, .prefetch = 3, .background = false},
                          {.shard_ranks = ranks, .micro_batches = 2, .accumulation = plan::hold_all}};
  if (ranks > 1) {
    plans.push_back({.shard_ranks = 1, .replicas = ranks});
    plans.push_back({.shard_ranks = 1, .replicas = ranks, .micro_batches = 2, .accumulation = plan::hold_all_reduce});
  }
  if (ranks == 4) {
    plans.push_back({.shard_ranks = 2, .replicas = 2, .micro_batches = 2, .accumulation = plan::hold_all_reduce});
  }
  return plans;
}

TEST_CASE("three steps in device memory are those of host memory, sharded and replicated") {
  std::vector<int> counts{1};
  for (const int n : {2, 4}) {
    if (num_gpus() >= n) counts.push_back(n);
  }
  for (const int ranks : counts) {
    CAPTURE(ranks);
    CHECK_NOTHROW(on_ranks(ranks, [&](threads& t) {
      nccl c = nccl::create(t);
      for (const plan& p : plans_for(ranks)) {
        compare_halves<ts::precision::bf16, ts::bfloat16, ts::reduction::ordered>(t, c, p, true);
        // small integers: exact in any order
        compare_halves<ts::precision::bf16_gradients, float, ts::reduction::native>(t, c, p, false);
      }
      compare_halves<ts::precision::fp32, float, ts::reduction::ordered>(t, c, {.shard_ranks = ranks}, true);
    }));
  }
}

TEST_CASE("the norm over a mixed mesh counts each parameter once, on the device as on the host") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  CHECK_NOTHROW(on_ranks(2, [&](threads& t) {
    nccl world = nccl::create(t);
    nccl alone = world.split(world.rank(), 0);
    threads host_alone = t.split(t.rank(), 0);
    // Dense parameters over both ranks; each rank has experts of its own; and the rank is one of two pipeline stages.
    const auto groups = [&](auto* dense, auto* own) {
      using comm_type = std::remove_pointer_t<decltype(dense)>;
      std::vector<sh::group<comm_type>> result;
      result.push_back({.name = "dense", .parameters = odd_parameters(0), .ranks = dense});
      result.push_back({.name = "experts", .parameters = odd_parameters(1), .ranks = own, .distinct = {dense}});
      result.push_back({.name = "head", .parameters = odd_parameters(2), .ranks = dense});
      return result;
    };
    using P = ts::precision::fp32;
    host_model<P, float, ts::reduction::ordered> host(groups(&t, &host_alone), {});
    device_model<P, float, ts::reduction::ordered, nccl> device(groups(&world, &alone), {});
    const cudaStream_t stream = device_test::make_stream();
    t.barrier({});
    for (const bool staged : {false, true}) {
      const auto value = [&](int g, int i, std::int64_t k) {
        return static_cast<float>(noise(g * 10 + i + 100 * t.rank(), k));
      };
      host.model.backward([&](int g) {
        for (int i = 0; i < 5; ++i) {
          const auto to = host.model.full_gradient(g, i);
          for (std::size_t k = 0; k < to.size(); ++k) to[k] = value(g, i, static_cast<std::int64_t>(k));
        }
      });
      device.model.backward(stream, [&](int g) {
        for (int i = 0; i < 5; ++i) {
          std::vector<float> values;
          for (std::int64_t k = 0; k < device.model.layout(g).elements(i); ++k) values.push_back(value(g, i, k));
          send(stream, device.model.full_gradient(g, i).data(), values);
          device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        }
      });
      const double expected = host.model.gradient_norm(staged ? &t : nullptr);
      device.model.gradient_norm(stream, 1.0, staged ? &world : nullptr);
      const double got = device.model.wait_for_norm(stream);
      require(got == expected, "norm ", got, " on the device, ", expected, " on the host");
      host.model.abandon_step();
      device.model.abandon_step(stream);
    }
    world.wait(stream);
    t.barrier({});
    device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }));
}

// One weight of `count` elements in a group, one rank, no communication.
template <class P>
struct lonely {
  self ranks;
  device_model<P, float, ts::reduction::native, self> device;
  cudaStream_t stream = device_test::make_stream();

  explicit lonely(const std::vector<std::int64_t>& counts) : device(groups(counts), {}) {}
  ~lonely() {
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
  std::vector<sh::group<self>> groups(const std::vector<std::int64_t>& counts) {
    std::vector<sh::group<self>> result;
    for (const std::int64_t n : counts) {
      result.push_back({.name = "group " + std::to_string(result.size()),
                        .parameters = {{.name = "w", .whole = ts::box::whole({n})}},
                        .ranks = &ranks});
    }
    return result;
  }
  void gradients(const std::vector<std::vector<typename P::gradient>>& values) {
    device.model.backward(stream, [&](int g) {
      send(stream, device.model.full_gradient(g, 0).data(), values[static_cast<std::size_t>(g)]);
    });
    device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
};

template <class A>
void check_exact_norms() {
  using P = std::conditional_t<std::is_same_v<A, float>, ts::precision::fp32, ts::precision::fp64>;
  constexpr std::int64_t count = 300001;
  lonely<P> one({count, 777});
  using limits = std::numeric_limits<A>;
  const double spread = std::is_same_v<A, float> ? 70.0 : 480.0;  // powers of two to either side
  for (int kind = 0; kind < 5; ++kind) {
    CAPTURE(kind);
    std::vector<std::vector<A>> values{std::vector<A>(count), std::vector<A>(777)};
    sh::exact_sum sum;
    sum.clear();
    for (std::size_t g = 0; g < 2; ++g) {
      for (std::size_t k = 0; k < values[g].size(); ++k) {
        const auto i = static_cast<std::int64_t>(k);
        double x = noise(kind, i) * 1e-3;
        if (kind == 1) x = std::ldexp(noise(1, i), static_cast<int>(spread * noise(2, i)));
        if (kind == 2)
          x = i % 5 == 0 ? 0.0 : static_cast<double>(limits::denorm_min()) * static_cast<double>(1 + i % 9);
        if (kind == 3) x = i == 0 ? 1e18 : noise(3, i) * 1e-12;  // a first element far from all others
        if (kind == 4) x = i % 2 == 0 ? -0.0 : 0.0;
        values[g][k] = static_cast<A>(x);
      }
      sum.add_squares(values[g].data(), static_cast<std::int64_t>(values[g].size()));
    }
    one.gradients(values);
    one.device.model.gradient_norm(one.stream, 0.5);
    const double expected = std::sqrt(sum.value());
    CHECK(one.device.model.wait_for_norm(one.stream) == expected);
    CHECK(fetch(one.stream, one.device.model.control(), 1)[0].scale == sh::clip_factor(expected, 0.5));
    one.device.model.abandon_step(one.stream);
  }
}

TEST_CASE("norms are exact over the whole range of the type, zeros and subnormal numbers included") {
  check_exact_norms<float>();
  check_exact_norms<double>();
}

TEST_CASE("a gradient that is not finite skips the step and is reported with its group") {
  for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    lonely<ts::precision::bf16> one({5000, 300});
    auto& model = one.device.model;
    model.set(one.stream, 0, 0, std::vector<float>(5000, 0.5F));
    model.set(one.stream, 1, 0, std::vector<float>(300, 0.25F));
    std::vector<std::vector<float>> values{std::vector<float>(5000, 0.125F), std::vector<float>(300, 0.125F)};
    one.gradients(values);
    model.gradient_norm(one.stream, 1.0);
    model.step(one.stream, {}, 1, 1e-2);
    const auto before =
        fetch(one.stream, one.device.state.data(), static_cast<std::int64_t>(model.memory().parameters));
    const auto master = fetch(one.stream, model.local(1, 0).master, 300);
    CHECK(master[0] < 0.25F);
    values[1][123] = bad;
    values[1][124] = bad;
    one.gradients(values);
    const double* norm = model.gradient_norm(one.stream, 1.0);
    model.step(one.stream, {}, 2, 1e-2);
    CHECK(std::isnan(fetch(one.stream, norm, 1)[0]));
    CHECK(same_bits(before,
                    fetch(one.stream, one.device.state.data(), static_cast<std::int64_t>(model.memory().parameters))));
    CHECK(same_bits(master, fetch(one.stream, model.local(1, 0).master, 300)));
    std::string text;
    try {
      model.wait_for_norm(one.stream);
    } catch (const ts::error& e) {
      text = e.what();
    }
    CHECK_MESSAGE(text.find("group 'group 1' (2 elements)") != std::string::npos, text);
    CHECK(text.find("group 0") == std::string::npos);
    values[1] = std::vector<float>(300, 0.125F);
    one.gradients(values);
    model.step(one.stream, {}, 2, 1e-2);  // without a norm: unscaled, whatever the last factor was
    CHECK(fetch(one.stream, model.local(1, 0).master, 300)[0] < master[0]);
  }
}

__global__ void gradient_kernel(const ts::bfloat16* parameter, float* gradient, std::int64_t count, float factor) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    gradient[i] = static_cast<float>(parameter[i]) * factor - 0.125f;
  }
}

TEST_CASE("a captured step is the same as steps that are enqueued one by one, on every replay") {
  const int ranks = (std::min)(num_gpus(), 2);
  CHECK_NOTHROW(on_ranks(ranks, [&](threads& t) {
    nccl c = nccl::create(t);
    nccl gather = c.split(0, c.rank());
    const auto run = [&](bool captured) {
      std::vector<sh::group<nccl>> groups;
      for (int g = 0; g < 3; ++g) {
        groups.push_back({.name = "group " + std::to_string(g),
                          .parameters = {{.name = "w", .whole = ts::box::whole({100 + g, 64})}},
                          .ranks = &c,
                          .gather = &gather});
      }
      device_model<ts::precision::bf16, float, ts::reduction::native, nccl> device(groups, {});
      auto& model = device.model;
      const cudaStream_t stream = device_test::make_stream();
      for (int g = 0; g < 3; ++g) {
        std::vector<float> whole;
        for (std::int64_t k = 0; k < model.layout(g).elements(0); ++k) whole.push_back(static_cast<float>(noise(g, k)));
        model.set(stream, g, 0, whole);
      }
      t.barrier({});
      const auto work = [&] {
        const auto use = [&](int g) {
          gradient_kernel<<<8, 128, 0, stream>>>(model.full(g, 0).data(), model.full_gradient(g, 0).data(),
                                                 model.layout(g).elements(0), static_cast<float>(1 + c.rank()));
        };
        model.forward(stream, [](int) {});
        model.backward(stream, use);
        model.divide_gradients(stream, 3.0);
        model.gradient_norm(stream, 2.0);
        model.step(stream, {.weight_decay = 0.1});
      };
      const sh::adamw_control start{0, 1e-2, 1.0, 0};
      device_test::require(cudaMemcpyAsync(model.control(), &start, sizeof(start), cudaMemcpyHostToDevice, stream),
                           "copy");
      work();  // connects the GPUs, in both runs
      c.wait(stream);
      t.barrier({});
      if (captured) {
        cudaGraphExec_t graph = device_test::capture(stream, work);
        t.barrier({});
        for (int i = 0; i < 4; ++i) device_test::require(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
        c.wait(stream);
        device_test::require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
      } else {
        for (int i = 0; i < 4; ++i) work();
        c.wait(stream);
      }
      require(fetch(stream, model.control(), 1)[0].step == 5, "five steps");
      std::vector<float> all;
      for (int g = 0; g < 3; ++g) {
        for (const float x : fetch(stream, model.local(g, 0).master, model.local(g, 0).count)) all.push_back(x);
      }
      t.barrier({});
      device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
      return all;
    };
    const auto one_by_one = run(false);
    const auto replayed = run(true);
    require(same_bits(one_by_one, replayed), "the bits differ");
    require(std::isfinite(one_by_one[0]) && one_by_one[0] != static_cast<float>(noise(0, 0)), "the steps do something");
  }));
}

TEST_CASE("gathers and reductions in the background run beside the computation") {
  const int ranks = (std::min)(num_gpus(), 2);
  double ms[2] = {}, norm_us = 0;
  CHECK_NOTHROW(on_ranks(ranks, [&](threads& t) {
    nccl c = nccl::create(t);
    nccl gather = c.split(0, c.rank());
    for (const bool background : {false, true}) {
      std::vector<sh::group<nccl>> groups;
      for (int g = 0; g < 8; ++g) {
        groups.push_back({.name = "group " + std::to_string(g),
                          .parameters = {{.name = "w", .whole = ts::box::whole({4096, 4096})}},
                          .ranks = &c,
                          .gather = background ? &gather : nullptr});
      }
      device_model<ts::precision::bf16, ts::bfloat16, ts::reduction::native, nccl> device(groups, {});
      device_test::require(cudaMemset(device.step.data(), 0, device.step.size()), "cudaMemset");
      auto& model = device.model;
      const cudaStream_t stream = device_test::make_stream();
      cudaEvent_t events[3];
      for (cudaEvent_t& e : events) device_test::require(cudaEventCreate(&e), "cudaEventCreate");
      device_test::synchronize();
      double best = 1e9, best_norm = 1e9;
      for (int run = 0; run < 6; ++run) {
        t.barrier({});
        device_test::require(cudaEventRecord(events[0], stream), "cudaEventRecord");
        model.forward(stream, [&](int) { stay_kernel<<<8, 32, 0, stream>>>(600000); });
        model.backward(stream, [&](int g) {
          static_cast<void>(model.full_gradient(g, 0));
          stay_kernel<<<8, 32, 0, stream>>>(600000);
        });
        model.join(stream);
        device_test::require(cudaEventRecord(events[1], stream), "cudaEventRecord");
        model.gradient_norm(stream);
        device_test::require(cudaEventRecord(events[2], stream), "cudaEventRecord");
        model.abandon_step(stream);
        c.wait(stream);
        float step = 0, norm = 0;
        device_test::require(cudaEventElapsedTime(&step, events[0], events[1]), "cudaEventElapsedTime");
        device_test::require(cudaEventElapsedTime(&norm, events[1], events[2]), "cudaEventElapsedTime");
        if (run > 0) best = (std::min)(best, static_cast<double>(step));  // the first connects the GPUs
        if (run > 0) best_norm = (std::min)(best_norm, 1e3 * static_cast<double>(norm));
      }
      if (t.rank() == 0) {
        ms[background ? 1 : 0] = best;
        norm_us = best_norm;
      }
      for (const cudaEvent_t e : events) device_test::require(cudaEventDestroy(e), "cudaEventDestroy");
      t.barrier({});
      device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
    }
  }));
  std::printf(
      "%d GPUs, 8 groups of 16.8 M parameters, 0.6 ms of computation each way: %.2f ms, in the background %.2f "
      "ms; norm %.0f us\n",
      ranks, ms[0], ms[1], norm_us);
  if (ranks > 1) CHECK(ms[1] < 0.97 * ms[0]);
}

TEST_CASE("wrong arguments throw before anything is enqueued") {
  lonely<ts::precision::bf16> one({100, 100});
  auto& model = one.device.model;
  using bad = ts::invalid_argument;
  CHECK_THROWS_AS(model.end_gather(one.stream, 0), bad);
  CHECK_THROWS_AS(model.release(one.stream, 0), bad);
  CHECK_THROWS_AS(model.begin_gather(one.stream, 2), bad);
  CHECK_THROWS_AS(model.reduce(one.stream, 0), bad);
  CHECK_THROWS_AS(model.gradient_norm(one.stream), bad);
  CHECK_THROWS_AS(model.step(one.stream, {}, 1, 1e-3), bad);
  CHECK_THROWS_AS(model.set(one.stream, 0, 0, std::vector<float>(99)), bad);
  one.gradients({std::vector<float>(100, 1.0F), std::vector<float>(100, 1.0F)});
  CHECK_THROWS_AS(model.divide_gradients(one.stream, 0.0), bad);
  CHECK_THROWS_AS(model.step(one.stream, {}, 0, 1e-3), bad);
  CHECK_THROWS_AS(model.step(one.stream, {.beta1 = 1.0}), bad);
  CHECK_NOTHROW(model.step(one.stream, {}, 1, 1e-3));
  auto groups = one.groups({100});
  groups[0].chunks_of_ranks = {1, 1};
  using type = device_model<ts::precision::bf16, float, ts::reduction::native, self>;
  CHECK_THROWS_AS(type(groups, {}), bad);
  groups[0].chunks_of_ranks = {0};
  CHECK_THROWS_AS(type(groups, {}), bad);
}

}  // namespace

#endif
