// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A small network whose gradients are written out by hand, and its training: unsharded in plain arrays, and sharded.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/comm/threads.hpp>
#include <tessera/shard/shard.hpp>

namespace shard_test {

namespace ts = tessera;
namespace sh = tessera::shard;

inline constexpr int inputs = 5, middle = 7, outputs = 3, depth = 3;  // depth layers: 5 -> 7 -> 7 -> 3
inline constexpr int samples = 12;                                    // of the global batch, each one a chunk

inline int rows_of(int layer) { return layer == depth - 1 ? outputs : middle; }
inline int cols_of(int layer) { return layer == 0 ? inputs : middle; }

/// Any number that looks random, the same everywhere.
inline double noise(std::int64_t a, std::int64_t b) {
  std::uint64_t x = static_cast<std::uint64_t>(a) * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(b + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((x ^ (x >> 31)) >> 11) / 9007199254740992.0 * 2.0 - 1.0;
}

/// Layers as groups: matrix [rows, cols] and bias [rows].
inline std::vector<sh::parameter> layer_parameters(int layer) {
  const std::string name = "layers." + std::to_string(layer);
  return {{.name = name + ".weight", .whole = ts::box::whole({rows_of(layer), cols_of(layer)})},
          {.name = name + ".bias", .whole = ts::box::whole({rows_of(layer)}), .decays = false}};
}

template <class A>
std::vector<A> initial(int layer, int i) {
  const int count = i == 0 ? rows_of(layer) * cols_of(layer) : rows_of(layer);
  std::vector<A> values(static_cast<std::size_t>(count));
  for (std::size_t k = 0; k < values.size(); ++k) {
    values[k] = static_cast<A>(0.5 * noise(100 * layer + i, static_cast<std::int64_t>(k)));
  }
  return values;
}

/// Activations of one sample: what enters each layer, and the last output.
template <class A>
using activations = std::vector<std::vector<A>>;

template <class A>
std::vector<A> sample_input(int sample, int step) {
  std::vector<A> x(inputs);
  for (int k = 0; k < inputs; ++k) x[static_cast<std::size_t>(k)] = static_cast<A>(noise(7000 + sample, step * 64 + k));
  return x;
}

/// y = W x + b, tanh but in the last layer.
template <class A, class S>
std::vector<A> layer_forward(int layer, const S* w, const S* b, const std::vector<A>& x) {
  std::vector<A> y(static_cast<std::size_t>(rows_of(layer)));
  for (int r = 0; r < rows_of(layer); ++r) {
    A sum = static_cast<A>(b[r]);
    for (int c = 0; c < cols_of(layer); ++c) {
      sum += static_cast<A>(w[r * cols_of(layer) + c]) * x[static_cast<std::size_t>(c)];
    }
    y[static_cast<std::size_t>(r)] = layer == depth - 1 ? sum : std::tanh(sum);
  }
  return y;
}

/// Half the squared distance to a target that is a function of the input; `dy` is its gradient.
template <class A>
double loss_of(const std::vector<A>& x, const std::vector<A>& y, std::vector<A>& dy) {
  double loss = 0;
  dy.resize(y.size());
  for (std::size_t r = 0; r < y.size(); ++r) {
    const A target = std::sin(A(3) * x[r]) + x[r + 1] * x[r + 2];
    dy[r] = y[r] - target;
    loss += 0.5 * static_cast<double>(dy[r]) * static_cast<double>(dy[r]);
  }
  return loss;
}

/// Gradient of a layer's parameters, added where `add`; `dy` becomes the gradient of what enters the layer.
template <class A, class S, class G>
void layer_backward(int layer, const S* w, const std::vector<A>& x, const std::vector<A>& y, std::vector<A>& dy, G* dw,
                    G* db, bool add) {
  std::vector<A> dx(x.size(), A(0));
  for (int r = 0; r < rows_of(layer); ++r) {
    const auto row = static_cast<std::size_t>(r);
    const A d = layer == depth - 1 ? dy[row] : dy[row] * (A(1) - y[row] * y[row]);
    db[r] = (add ? db[r] : G(0)) + static_cast<G>(d);
    for (int c = 0; c < cols_of(layer); ++c) {
      const int k = r * cols_of(layer) + c;
      const auto column = static_cast<std::size_t>(c);
      const A product = d * x[column];
      dw[k] = (add ? dw[k] : G(0)) + static_cast<G>(product);
      dx[column] += d * static_cast<A>(w[k]);
    }
  }
  dy = dx;
}

struct run_options {
  int shard_ranks = 1;
  int replicas = 1;
  int prefetch = 1;
  bool background = false;                         // gather on a thread
  std::vector<bool> reshard = {true, true, true};  // after forward, per layer
  int micro_batches = 1;                           // each with the same samples of another step
  enum { reduce_all, hold_all_reduce, hold_all } accumulation = reduce_all;
  int steps = 6;
};

inline const sh::adamw_options coefficients{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1};
inline constexpr double rate = 0.02, max_norm = 0.4;

/// Losses of all steps, and what the parameters are afterwards.
struct run_result {
  std::vector<double> losses, norms;
  std::vector<double> parameters;

  bool operator==(const run_result& other) const {  // bits
    const auto same = [](const std::vector<double>& a, const std::vector<double>& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), 8 * a.size()) == 0);
    };
    return same(losses, other.losses) && same(norms, other.norms) && same(parameters, other.parameters);
  }
};

/// Without the library's sharding: plain arrays, one rank, chunks added up one after another.
template <class P, class M>
run_result train_unsharded(const run_options& o) {
  using S = typename P::storage;
  using A = typename P::accumulate;
  struct tensor {
    std::vector<A> master, sum;
    std::vector<std::vector<A>> chunks;
    std::vector<M> m, v;
    std::vector<S> value;
    bool decays;
  };
  std::vector<tensor> all;
  for (int layer = 0; layer < depth; ++layer) {
    for (int i = 0; i < 2; ++i) {
      tensor t{initial<A>(layer, i), {}, {}, {}, {}, {}, i == 0};
      const std::size_t count = t.master.size();
      t.sum.resize(count);
      t.chunks.assign(samples, std::vector<A>(count));
      t.m.assign(count, M{});
      t.v.assign(count, M{});
      for (const A x : t.master) t.value.push_back(static_cast<S>(x));
      all.push_back(t);
    }
  }
  run_result result;
  for (int step = 0; step < o.steps; ++step) {
    double loss = 0;
    for (int micro = 0; micro < o.micro_batches; ++micro) {
      double micro_loss = 0;
      for (int sample = 0; sample < samples; ++sample) {
        activations<A> a{sample_input<A>(sample, step * o.micro_batches + micro)};
        for (int layer = 0; layer < depth; ++layer) {
          const auto l = static_cast<std::size_t>(2 * layer);
          a.push_back(layer_forward(layer, all[l].value.data(), all[l + 1].value.data(), a.back()));
        }
        std::vector<A> dy;
        const double own = loss_of(a.front(), a.back(), dy);
        micro_loss = sample == 0 ? own : micro_loss + own;
        for (int layer = depth - 1; layer >= 0; --layer) {
          const auto l = static_cast<std::size_t>(2 * layer), s = static_cast<std::size_t>(sample);
          layer_backward(layer, all[l].value.data(), a[l / 2], a[l / 2 + 1], dy, all[l].chunks[s].data(),
                         all[l + 1].chunks[s].data(), o.accumulation == run_options::hold_all && micro > 0);
        }
      }
      loss += micro_loss;
      const bool last = micro == o.micro_batches - 1;
      if (o.accumulation == run_options::hold_all && !last) continue;
      for (tensor& t : all) {
        for (std::size_t k = 0; k < t.sum.size(); ++k) {
          A sum = t.chunks[0][k];
          for (std::size_t s = 1; s < samples; ++s) sum += t.chunks[s][k];
          t.sum[k] = o.accumulation != run_options::hold_all && micro > 0 ? t.sum[k] + sum : sum;
        }
      }
    }
    result.losses.push_back(loss);
    sh::exact_sum squares;
    squares.clear();
    for (tensor& t : all) {
      for (A& g : t.sum) g /= static_cast<A>(samples * o.micro_batches);
      squares.add_squares(t.sum.data(), static_cast<std::int64_t>(t.sum.size()));
    }
    result.norms.push_back(std::sqrt(squares.value()));
    for (tensor& t : all) {
      const sh::adamw_tensor<S, A, M> one{t.value.data(), t.master.data(), t.sum.data(),
                                          t.m.data(),     t.v.data(),      static_cast<std::int64_t>(t.sum.size()),
                                          t.decays};
      sh::adamw<S, A, M>({}, coefficients, step + 1, rate, sh::clip_factor(result.norms.back(), max_norm), {&one, 1});
      if constexpr (std::is_same_v<S, A>) t.value = t.master;
    }
  }
  for (const tensor& t : all) {
    for (const S x : t.value) result.parameters.push_back(static_cast<double>(x));
  }
  return result;
}

/// One rank of the sharded run. @param at_step Called after each step.
template <class P, class M, class R>
run_result train_rank(ts::comm::threads& world, const run_options& o,
                      const std::function<void(int step)>& at_step = {}) {
  using A = typename P::accumulate;
  using comm_type = ts::comm::threads;
  comm_type ranks = world.split(world.rank() / o.shard_ranks, world.rank());
  comm_type replicas = world.split(world.rank() % o.shard_ranks, world.rank());
  comm_type gather = ranks.split(0, ranks.rank());
  const int first = samples * world.rank() / world.size();
  const int local = samples * (world.rank() + 1) / world.size() - first;
  const std::int64_t max_chunks = R::keeps_chunks ? (samples + world.size() - 1) / world.size() : 1;

  std::vector<sh::group<comm_type>> groups;
  std::vector<sh::group_shape> shapes;
  for (int layer = 0; layer < depth; ++layer) {
    groups.push_back({.name = "layer " + std::to_string(layer),
                      .parameters = layer_parameters(layer),
                      .ranks = &ranks,
                      .replicas = o.replicas > 1 ? &replicas : nullptr,
                      .gather = o.background ? &gather : nullptr,
                      .chunks = R::keeps_chunks ? local : 1,
                      .max_chunks = max_chunks,
                      .reshard_after_forward = o.reshard[static_cast<std::size_t>(layer)]});
    shapes.push_back(sh::shape_of(groups.back()));
  }
  const sh::options choices{.prefetch = o.prefetch, .accumulate_unsharded = o.accumulation == run_options::hold_all};
  const auto sizes = sh::memory_of<P, M, R>(shapes, choices);
  ts::host_buffer state(sizes.state()), step_buffer(sizes.step());
  sh::fully_sharded<P, M, R, comm_type> model(groups, choices, ts::state_memory(state), sh::step_memory(step_buffer));
  for (int layer = 0; layer < depth; ++layer) {
    for (int i = 0; i < 2; ++i) model.set(layer, i, initial<A>(layer, i));
  }

  run_result result;
  std::vector<activations<A>> a(static_cast<std::size_t>(local));
  for (int step = 0; step < o.steps; ++step) {
    double loss = 0;
    for (int micro = 0; micro < o.micro_batches; ++micro) {
      const bool last = micro == o.micro_batches - 1;
      model.set_requires_all_reduce(o.accumulation != run_options::hold_all_reduce || last);
      if (o.accumulation == run_options::hold_all) model.set_requires_gradient_sync(last);
      for (int s = 0; s < local; ++s) {
        a[static_cast<std::size_t>(s)] = {sample_input<A>(first + s, step * o.micro_batches + micro)};
      }
      model.forward([&](int g) {
        for (auto& own : a)
          own.push_back(layer_forward(g, model.full(g, 0).data(), model.full(g, 1).data(), own.back()));
      });
      std::vector<std::vector<A>> dy(a.size());
      std::vector<double> losses;
      for (std::size_t s = 0; s < a.size(); ++s) losses.push_back(loss_of(a[s].front(), a[s].back(), dy[s]));
      model.backward([&](int g) {
        for (std::size_t s = 0; s < a.size(); ++s) {
          const std::int64_t chunk = R::keeps_chunks ? static_cast<std::int64_t>(s) : 0;
          const bool add = model.gradient_mode(g) == ts::write::accumulate || (!R::keeps_chunks && s > 0);
          layer_backward(g, model.full(g, 0).data(), a[s][static_cast<std::size_t>(g)],
                         a[s][static_cast<std::size_t>(g) + 1], dy[s], model.full_gradient(g, 0, chunk).data(),
                         model.full_gradient(g, 1, chunk).data(), add);
        }
      });
      double sum = 0;
      ts::host_buffer workspace(ts::ordered_all_reduce_workspace_bytes<double>(world.size(), samples, 1));
      ts::ordered_all_reduce({}, world, losses.data(), local, 1, &sum, ts::workspace_memory(workspace));
      loss += sum;
    }
    result.losses.push_back(loss);
    model.divide_gradients(samples * o.micro_batches);
    result.norms.push_back(model.gradient_norm());
    model.step(coefficients, step + 1, rate, sh::clip_factor(result.norms.back(), max_norm));
    if (at_step) at_step(step);
  }
  for (int g = 0; g < depth; ++g) {
    model.begin_gather(g);
    model.end_gather(g);
    for (int i = 0; i < 2; ++i) {
      for (const auto x : model.full(g, i)) result.parameters.push_back(static_cast<double>(x));
    }
    model.release(g);
  }
  return result;
}

/// All ranks; every rank's result.
template <class P, class M, class R>
std::vector<run_result> train(const run_options& o) {
  std::vector<run_result> results(static_cast<std::size_t>(o.shard_ranks * o.replicas));
  ts::comm::threads::run(o.shard_ranks * o.replicas, [&](ts::comm::threads& world) {
    results[static_cast<std::size_t>(world.rank())] = train_rank<P, M, R>(world, o);
  });
  return results;
}

}  // namespace shard_test
