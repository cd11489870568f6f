// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A small model with a chain behind it: its direct evaluation in double, position by position as equations 21 to 25 are
// written, and the same problem through the library.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include <tessera/mtp/mtp.hpp>

#include "../support/cast.hpp"

namespace mtp_test {

namespace ts = tessera;
namespace mtp = tessera::mtp;

using tessera_test::cast;
using tessera_test::to_storage;
using tessera_test::widen;

inline std::vector<double> random_values(std::int64_t count, double scale, std::uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& v : values) v = scale * normal(engine);
  return values;
}

// Where each parameter lies in one flat array. Shared ones first, then depth by depth.
struct parameter_map {
  std::int64_t d = 0, vocabulary = 0;
  int depths = 0;

  std::int64_t table() const { return 0; }
  std::int64_t head() const { return vocabulary * d; }
  std::int64_t depth_size() const { return 3 * d + 2 * d * d + d * d + d; }
  std::int64_t at(int k) const { return 2 * vocabulary * d + (k - 1) * depth_size(); }
  std::int64_t hidden_gain(int k) const { return at(k); }
  std::int64_t embedding_gain(int k) const { return at(k) + d; }
  std::int64_t output_gain(int k) const { return at(k) + 2 * d; }
  std::int64_t projection(int k) const { return at(k) + 3 * d; }
  std::int64_t block(int k) const { return at(k) + 3 * d + 2 * d * d; }  // W [d, d], then b [d]
  std::int64_t size() const { return at(depths + 1); }
};

struct problem {
  parameter_map map;
  bool embedding_first = false;
  bool output_norm = true;
  std::vector<std::int32_t> token_ids, targets, positions, sequence_offsets, chunk_offsets;
  std::vector<double> parameters, hidden;  // hidden [T, d]

  std::int64_t rows() const { return static_cast<std::int64_t>(token_ids.size()); }
  mtp::batch batch() const { return {token_ids, targets, positions, sequence_offsets, chunk_offsets}; }
};

// Sequences of documents: {{5, 4}, {7}} is one sequence of two documents and one of one. `start`: position of each
// document's first token. No positions are given if `with_positions` is false.
inline problem make_problem(int depths, std::int64_t d, std::int64_t vocabulary,
                            const std::vector<std::vector<int>>& sequences, bool with_positions, std::uint32_t seed,
                            std::int32_t start = 0) {
  problem p;
  p.map = {d, vocabulary, depths};
  std::mt19937 engine(seed);
  p.sequence_offsets = {0};
  for (const auto& documents : sequences) {
    for (const int length : documents)
      for (int i = 0; i < length; ++i) {
        p.token_ids.push_back(static_cast<std::int32_t>(engine() % static_cast<unsigned>(vocabulary)));
        if (with_positions) p.positions.push_back(start + i);
      }
    p.sequence_offsets.push_back(static_cast<std::int32_t>(p.token_ids.size()));
  }
  for (std::size_t i = 0; i < p.token_ids.size(); ++i)
    p.targets.push_back(i + 1 < p.token_ids.size()
                            ? p.token_ids[i + 1]
                            : static_cast<std::int32_t>(engine() % static_cast<unsigned>(vocabulary)));
  p.parameters = random_values(p.map.size(), 0.5, seed + 1);
  for (int k = 1; k <= depths; ++k)
    for (std::int64_t j = 0; j < 3 * d; ++j) p.parameters[static_cast<std::size_t>(p.map.at(k) + j)] += 1.0;
  p.hidden = random_values(p.rows() * d, 1.0, seed + 2);
  return p;
}

// Sums of -log P of each depth by equations 21 to 24, one position after another.
inline std::vector<double> direct_losses(const problem& p, std::span<const double> params,
                                         std::span<const double> hidden) {
  using vec = std::vector<double>;
  const parameter_map& map = p.map;
  const auto d = static_cast<std::size_t>(map.d), rows = static_cast<std::size_t>(p.rows());
  const double* w = params.data();
  std::vector<int> sequence(rows);
  for (std::size_t s = 0; s + 1 < p.sequence_offsets.size(); ++s)
    for (auto i = p.sequence_offsets[s]; i < p.sequence_offsets[s + 1]; ++i)
      sequence[static_cast<std::size_t>(i)] = static_cast<int>(s);
  const auto position = [&](std::size_t i) -> long {
    if (!p.positions.empty()) return p.positions[i];
    return static_cast<long>(i) - p.sequence_offsets[static_cast<std::size_t>(sequence[i])];
  };
  const auto related = [&](std::size_t i, std::size_t j) {  // i <= j: t_j follows t_i in one document
    return j < rows && sequence[i] == sequence[j] && position(j) == position(i) + static_cast<long>(j - i);
  };
  const auto norm = [&](const vec& x, const double* gain) {
    double squares = 0;
    for (const double v : x) squares += v * v;
    vec y(d);
    for (std::size_t j = 0; j < d; ++j) y[j] = gain[j] * x[j] / std::sqrt(squares / static_cast<double>(d) + 1e-6);
    return y;
  };

  std::vector<vec> before(rows);
  for (std::size_t i = 0; i < rows; ++i) before[i].assign(hidden.data() + i * d, hidden.data() + (i + 1) * d);
  vec losses;
  for (int k = 1; k <= map.depths; ++k) {
    std::vector<vec> mixed(rows), after(rows);
    for (std::size_t i = 0; i < rows; ++i) {
      const std::size_t partner = i + static_cast<std::size_t>(k);
      if (!related(i, partner)) continue;
      const double* embedding = w + map.table() + p.token_ids[partner] * map.d;
      const vec a = norm(before[i], w + map.hidden_gain(k));
      const vec e = norm(vec(embedding, embedding + d), w + map.embedding_gain(k));
      vec joined = p.embedding_first ? e : a;
      const vec& second = p.embedding_first ? a : e;
      joined.insert(joined.end(), second.begin(), second.end());
      mixed[i].assign(d, 0.0);
      for (std::size_t o = 0; o < d; ++o)
        for (std::size_t j = 0; j < 2 * d; ++j)
          mixed[i][o] += w[map.projection(k) + static_cast<long>(o * 2 * d + j)] * joined[j];
    }
    double loss = 0;
    for (std::size_t i = 0; i < rows; ++i) {
      if (mixed[i].empty()) continue;
      vec mean(d, 0.0);
      double count = 0;
      for (std::size_t j = 0; j <= i; ++j) {
        if (mixed[j].empty() || !related(j, i)) continue;
        for (std::size_t c = 0; c < d; ++c) mean[c] += mixed[j][c];
        count += 1;
      }
      after[i] = mixed[i];
      for (std::size_t o = 0; o < d; ++o) {
        double z = 0.1 * static_cast<double>(position(i)) * w[map.block(k) + map.d * map.d + static_cast<long>(o)];
        for (std::size_t j = 0; j < d; ++j) z += w[map.block(k) + static_cast<long>(o * d + j)] * mean[j] / count;
        after[i][o] += std::tanh(z);
      }
      const std::int32_t target = p.targets[i + static_cast<std::size_t>(k)];
      if (target < 0) continue;
      const vec out = p.output_norm ? norm(after[i], w + map.output_gain(k)) : after[i];
      vec logits(static_cast<std::size_t>(map.vocabulary), 0.0);
      double sum = 0;
      for (std::size_t v = 0; v < logits.size(); ++v) {
        for (std::size_t j = 0; j < d; ++j) logits[v] += w[map.head() + static_cast<long>(v * d + j)] * out[j];
        sum += std::exp(logits[v]);
      }
      loss += std::log(sum) - logits[static_cast<std::size_t>(target)];
    }
    losses.push_back(loss);
    before = after;
  }
  return losses;
}

// y_i = x_i + tanh(W mean_{j <= i} x_j + 0.1 position_i b), means over the rows of one document.
template <class Precision>
class mean_block {
 public:
  using S = typename Precision::storage;
  using A = typename Precision::accumulate;

  mean_block(std::int64_t d, mtp::parameter<A, A> weights) : d_(d), w_(weights) {}

  std::size_t saved_bytes(std::int64_t rows) const { return sizes(rows); }
  std::size_t deferred_bytes(std::int64_t rows) const { return sizes(rows); }
  std::size_t workspace_bytes(std::int64_t) const { return sizeof(A) * static_cast<std::size_t>(d_); }

  void forward(ts::host_stream, ts::pass mode, const mtp::depth_rows& rows, ts::matrix_view<const S> x,
               ts::matrix_view<S> y, ts::saved_memory saved, ts::workspace_memory) {
    modes.push_back(mode);
    seen_rows.push_back(x.rows);
    A* mean = mean_of(saved.data, x.rows);
    A* t = mean + x.rows * d_;
    for (std::size_t n = 0; n + 1 < rows.sequence_offsets.size(); ++n) {
      const std::int64_t first = rows.sequence_offsets[n];
      for (std::int64_t i = first; i < rows.sequence_offsets[n + 1]; ++i)
        for (std::int64_t j = 0; j < d_; ++j) {
          A sum = 0;
          for (std::int64_t r = first; r <= i; ++r) sum += static_cast<A>(x(r, j));
          mean[i * d_ + j] = sum / static_cast<A>(i - first + 1);
        }
    }
    for (std::int64_t i = 0; i < x.rows; ++i)
      for (std::int64_t o = 0; o < d_; ++o) {
        A z = scaled_position(rows, i) * w_.values[d_ * d_ + o];
        for (std::int64_t j = 0; j < d_; ++j) z += w_.values[o * d_ + j] * mean[i * d_ + j];
        t[i * d_ + o] = std::tanh(z);
        y(i, o) = to_storage<S>(static_cast<double>(static_cast<A>(x(i, o)) + t[i * d_ + o]));
      }
  }

  void backward_input(ts::host_stream, const mtp::depth_rows& rows, ts::matrix_view<const S> x,
                      ts::matrix_view<const S> dy, ts::matrix_view<S> dx, ts::saved_memory saved,
                      ts::deferred_memory deferred, ts::workspace_memory workspace) {
    const A* t = mean_of(saved.data, x.rows) + x.rows * d_;
    A* dz = mean_of(deferred.data, x.rows);
    A* dmean = dz + x.rows * d_;
    A* carry = reinterpret_cast<A*>(workspace.data);
    for (std::int64_t i = 0; i < x.rows; ++i)
      for (std::int64_t o = 0; o < d_; ++o)
        dz[i * d_ + o] = static_cast<A>(dy(i, o)) * (A(1) - t[i * d_ + o] * t[i * d_ + o]);
    for (std::int64_t i = 0; i < x.rows; ++i)
      for (std::int64_t j = 0; j < d_; ++j) {
        A sum = 0;
        for (std::int64_t o = 0; o < d_; ++o) sum += w_.values[o * d_ + j] * dz[i * d_ + o];
        dmean[i * d_ + j] = sum;
      }
    for (std::size_t n = 0; n + 1 < rows.sequence_offsets.size(); ++n) {
      const std::int64_t first = rows.sequence_offsets[n];
      std::fill_n(carry, d_, A(0));
      for (std::int64_t i = rows.sequence_offsets[n + 1]; i-- > first;)
        for (std::int64_t j = 0; j < d_; ++j) {
          carry[j] += dmean[i * d_ + j] / static_cast<A>(i - first + 1);
          dx(i, j) = to_storage<S>(static_cast<double>(static_cast<A>(dy(i, j)) + carry[j]) + own_gradient);
        }
    }
  }

  void backward_weights(ts::host_stream, const mtp::depth_rows& rows, ts::matrix_view<const S> x,
                        ts::matrix_view<const S>, ts::saved_memory saved, ts::deferred_memory deferred, ts::write mode,
                        ts::workspace_memory) {
    const A* mean = mean_of(saved.data, x.rows);
    const A* dz = mean_of(deferred.data, x.rows);
    for (std::size_t c = 0; c + 1 < rows.chunk_offsets.size(); ++c) {
      A* g = w_.gradient + static_cast<std::int64_t>(c) * w_.gradient_stride;
      if (mode == ts::write::overwrite) std::fill_n(g, d_ * d_ + d_, A(0));
      for (std::int64_t i = rows.chunk_offsets[c]; i < rows.chunk_offsets[c + 1]; ++i)
        for (std::int64_t o = 0; o < d_; ++o) {
          for (std::int64_t j = 0; j < d_; ++j) g[o * d_ + j] += dz[i * d_ + o] * mean[i * d_ + j];
          g[d_ * d_ + o] += scaled_position(rows, i) * dz[i * d_ + o];
        }
    }
  }

  double own_gradient = 0;                // of a loss inside of the block, such as one that balances load
  std::vector<ts::pass> modes{};          // of the calls so far
  std::vector<std::int64_t> seen_rows{};  // in the calls so far

 private:
  std::size_t sizes(std::int64_t rows) const { return 2 * sizeof(A) * static_cast<std::size_t>(rows * d_); }
  static A scaled_position(const mtp::depth_rows& rows, std::int64_t i) {
    return static_cast<A>(0.1) * static_cast<A>(rows.positions[static_cast<std::size_t>(i)]);
  }
  static A* mean_of(std::byte* data, std::int64_t) { return reinterpret_cast<A*>(data); }

  std::int64_t d_;
  mtp::parameter<A, A> w_;
};

inline void poison(ts::host_buffer& buffer) {
  if (buffer.size() > 0) std::memset(buffer.data(), 0xff, buffer.size());  // NaN in every floating type
}

// The problem through the library. Gradients are laid out as the parameters are, chunk by chunk.
template <class Precision, class Concat, int Depth = 0>
struct library_model {
  using S = typename Precision::storage;
  using A = typename Precision::accumulate;
  using block = mean_block<Precision>;
  using norm = mtp::rms_norm<Precision>;
  using projection = mtp::linear<Precision>;
  using chain_type = mtp::chain<block, Precision, Concat, mtp::token_embedding<Precision>, mtp::softmax_head<Precision>,
                                norm, projection, Depth>;

  explicit library_model(const problem& p, mtp::row_policy policy = mtp::row_policy::valid, std::int64_t spare_rows = 0,
                         bool shared_depths = false, std::int64_t tile_rows = 3)
      : map(p.map),
        chunks(p.chunk_offsets.empty() ? 1 : static_cast<std::int64_t>(p.chunk_offsets.size()) - 1),
        values(cast<S>(p.parameters)),
        wide(cast<A>(p.parameters)),
        hidden(cast<S>(p.hidden)),
        gradients(static_cast<std::size_t>(chunks * map.size()), A(0)),
        hidden_gradient(hidden.size()),
        losses(static_cast<std::size_t>(chunks * map.depths)),
        embedding(map.vocabulary, map.d, stored(map.table())),
        head(map.d, map.vocabulary, stored(map.head()), tile_rows) {
    std::vector<typename chain_type::parts> parts;
    for (int k = 1; k <= map.depths; ++k) {
      if (shared_depths && k > 1) {
        parts.push_back(parts.front());
        continue;
      }
      for (const std::int64_t gain : {map.hidden_gain(k), map.embedding_gain(k), map.output_gain(k)})
        norms.push_back(std::make_unique<norm>(map.d, accumulated(gain)));
      projections.push_back(std::make_unique<projection>(2 * map.d, map.d, stored(map.projection(k))));
      blocks.push_back(std::make_unique<block>(map.d, accumulated(map.block(k))));
      const std::size_t n = norms.size();
      parts.push_back({norms[n - 3].get(), norms[n - 2].get(), projections.back().get(), blocks.back().get(),
                       p.output_norm ? norms[n - 1].get() : nullptr});
    }
    chain = std::make_unique<chain_type>(
        mtp::chain_shape{.hidden = map.d, .max_rows = p.rows() + spare_rows, .max_chunks = chunks, .rows = policy},
        parts, embedding, head);
    saved = ts::host_buffer(chain->sizes().saved_bytes);
    deferred = ts::host_buffer(chain->sizes().deferred_bytes);
    workspace = ts::host_buffer(std::max(chain->sizes().workspace_bytes, chain->sizes().eval_workspace_bytes));
    for (auto* buffer : {&saved, &deferred, &workspace}) poison(*buffer);
    // The depths' own gradients are overwritten: garbage there must not matter. Shared ones are added to.
    for (std::int64_t c = 0; c < chunks; ++c)
      for (std::int64_t j = 2 * map.vocabulary * map.d; j < map.size(); ++j)
        gradients[static_cast<std::size_t>(c * map.size() + j)] = A(99);
  }

  ts::matrix_view<const S> hidden_view() const {
    return {hidden.data(), static_cast<std::int64_t>(hidden.size()) / map.d, map.d};
  }
  ts::matrix_view<S> hidden_gradient_view() {
    return {hidden_gradient.data(), static_cast<std::int64_t>(hidden.size()) / map.d, map.d};
  }

  void forward(const problem& p, ts::pass mode = ts::pass::train) {
    chain->forward({}, mode, p.batch(), hidden_view(), losses,
                   mode == ts::pass::eval ? ts::saved_memory{} : ts::saved_memory(saved), workspace);
  }
  void backward(const problem& p, std::span<const double> factors, ts::write mode = ts::write::overwrite) {
    chain->backward_input({}, p.batch(), hidden_view(), factors, hidden_gradient_view(), mode, saved, deferred,
                          workspace);
    poison(workspace);
    chain->backward_weights({}, p.batch(), hidden_view(), factors, mode, saved, deferred, workspace);
  }

  // Summed over chunks, in the order of the parameters; the output norms' zero where there are none.
  std::vector<double> summed_gradients(bool output_norm) const {
    std::vector<double> sum(static_cast<std::size_t>(map.size()), 0.0);
    for (std::int64_t c = 0; c < chunks; ++c)
      for (std::size_t j = 0; j < sum.size(); ++j)
        sum[j] += widen(gradients[static_cast<std::size_t>(c) * sum.size() + j]);
    for (int k = 1; k <= map.depths && !output_norm; ++k)
      for (std::int64_t j = 0; j < map.d; ++j) sum[static_cast<std::size_t>(map.output_gain(k) + j)] = 0;
    return sum;
  }
  std::vector<double> depth_losses() const {
    std::vector<double> sums;
    for (int k = 0; k < map.depths; ++k) {
      double sum = 0;
      for (std::int64_t c = 0; c < chunks; ++c) sum += losses[static_cast<std::size_t>(k * chunks + c)];
      sums.push_back(sum);
    }
    return sums;
  }

  mtp::parameter<S, A> stored(std::int64_t at) { return {values.data() + at, gradients.data() + at, map.size()}; }
  mtp::parameter<A, A> accumulated(std::int64_t at) { return {wide.data() + at, gradients.data() + at, map.size()}; }

  parameter_map map;
  std::int64_t chunks;
  std::vector<S> values;
  std::vector<A> wide;
  std::vector<S> hidden;
  std::vector<A> gradients;
  std::vector<S> hidden_gradient;
  std::vector<double> losses;
  mtp::token_embedding<Precision> embedding;
  mtp::softmax_head<Precision> head;
  std::vector<std::unique_ptr<norm>> norms;
  std::vector<std::unique_ptr<projection>> projections;
  std::vector<std::unique_ptr<block>> blocks;
  std::unique_ptr<chain_type> chain;
  ts::host_buffer saved, deferred, workspace;
};

}  // namespace mtp_test
