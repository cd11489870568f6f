// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of `fully_sharded.hpp`.

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>

#include <tessera/core/error.hpp>
#include <tessera/core/nvtx.hpp>
#include <tessera/shard/fully_sharded.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
fully_sharded<Precision, Moment, Reduction, Comm>::fully_sharded(std::vector<group<Comm>> groups,
                                                                 const options& choices, state_memory state,
                                                                 step_memory step)
    : base(std::move(groups), choices, state, step) {
  if (this->background()) {
    queue_ = std::make_unique<detail::gather_queue>(
        num_groups(), [this](int g) { gather_now(g); },
        [this] {
          if constexpr (requires(Comm & c) { c.fail(std::string()); }) {
            groups_.front().gather->fail("an exception ends it while parameters are being gathered");
          }
        });
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::set(int g, int i, std::span<const accumulate> whole) {
  this->expect_settable(g, i, whole.size());
  const group<Comm>& own = groups_[index(g)];
  states_[index(g)].gather = gather_state::absent;  // what stays gathered would be stale
  const tensor part = local(g, i);
  layout(g).copy_part(i, own.ranks->rank(), whole.data(), part.master);
  if constexpr (!std::is_same_v<storage, accumulate>) {
    detail::copy_elements(part.master, part.parameter, part.count, false);
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::masters_from_parameters() {
  if constexpr (!std::is_same_v<storage, accumulate>) {
    for (const tensor& t : tensors_) detail::copy_elements(t.parameter, t.master, t.count, false);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::gather_now(int g) {
  group<Comm>& own = groups_[index(g)];
  Comm& comm = own.gather == nullptr ? *own.ranks : *own.gather;
  const auto& m = memory_.groups[index(g)];
  const std::int64_t row = layout(g).row_elements();
  storage* const mine = memory_.gather_buffer + comm.rank() * row;
  storage* place = mine;
  for (int i = 0; i < layout(g).num_parameters(); ++i) {
    const std::int64_t count = layout(g).part_elements(i, comm.rank());
    detail::copy_elements(m.parameter[static_cast<std::size_t>(i)], place, count, false);
    place += count;
  }
  std::fill(place, mine + row, storage{});
  comm.all_gather(host_stream{}, mine, memory_.gather_buffer, row);
  layout(g).unpack(memory_.gather_buffer, std::span<storage* const>(m.full));
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::begin_gather(int g) {
  [[maybe_unused]] const nvtx_range range("tessera::shard::fully_sharded::begin_gather");
  if (!this->take_slot(g)) return;
  if (queue_) {
    queue_->post(g);
    return;
  }
  group_state& s = states_[index(g)];
  try {
    gather_now(g);
  } catch (...) {
    this->free_slot(s);
    throw;
  }
  s.gather = gather_state::gathered;
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::end_gather(int g) {
  group_state& s = states_[index(g)];
  TESSERA_EXPECTS(s.gather != gather_state::absent,
                  "end_gather of shard group '" << groups_[index(g)].name << "' without begin_gather");
  if (s.gather == gather_state::gathered) return;
  try {
    queue_->wait(g);
  } catch (...) {
    this->free_slot(s);
    throw;
  }
  s.gather = gather_state::gathered;
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
template <class F>
void fully_sharded<Precision, Moment, Reduction, Comm>::forward(F&& use) {
  for (int g = 0; g < num_groups(); ++g) {
    for (int ahead = g; ahead <= g + choices_.prefetch && ahead < num_groups(); ++ahead) begin_gather(ahead);
    end_gather(g);
    use(g);
    release(g);
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
template <class F>
void fully_sharded<Precision, Moment, Reduction, Comm>::backward(F&& use) {
  for (int g = num_groups() - 1; g >= 0; --g) {
    for (int ahead = g; ahead >= g - choices_.prefetch && ahead >= 0; --ahead) begin_gather(ahead);
    end_gather(g);
    use(g);
    release(g);
    reduce(g);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::reduce(int g) {
  [[maybe_unused]] const nvtx_range range("tessera::shard::fully_sharded::reduce");
  group<Comm>& own = groups_[index(g)];
  group_state& s = states_[index(g)];
  auto& m = memory_.groups[index(g)];
  const group_layout& where = layout(g);
  if (!this->starts_reduction(g)) return;
  const std::int64_t row = where.row_elements();
  const std::int64_t stride = where.ranks() * row;
  const auto parameters = static_cast<std::size_t>(where.num_parameters());
  for (std::int64_t chunk = 0; chunk < own.chunks; ++chunk) {
    const std::span<gradient* const> whole(m.contribution.data() + static_cast<std::size_t>(chunk) * parameters,
                                           parameters);
    if constexpr (Reduction::keeps_chunks) {
      where.pack(whole, memory_.packed + chunk * stride);
    } else {
      where.pack(whole, memory_.packed, chunk > 0);
    }
  }

  const host_stream stream;
  const bool replicated = this->replicated(g);
  accumulate* rows = replicated && !s.half_reduced ? m.rows : memory_.rows;
  const std::int64_t num_rows =
      Reduction::scatter(stream, *own.ranks, static_cast<const accumulate*>(memory_.packed),
                         Reduction::keeps_chunks ? own.chunks : 1, row, rows, this->max_rows(g), memory_.workspace);
  if (s.half_reduced) {
    TESSERA_EXPECTS(num_rows == s.num_rows, "shard group '" << own.name << "' has " << num_rows
                                                            << " chunks in this micro-batch and had " << s.num_rows
                                                            << " in the last");
    detail::copy_elements(rows, m.rows, num_rows * row, true);
    rows = m.rows;
  }
  this->gradients_are_read(g);
  if (replicated) {
    s.num_rows = num_rows;
    s.half_reduced = true;
    if (!this->all_reduce_) return;
  }
  Reduction::join(stream, replicated ? own.replicas : nullptr, static_cast<const accumulate*>(rows), num_rows, row,
                  memory_.result, memory_.workspace);
  s.half_reduced = false;
  const accumulate* place = memory_.result;
  for (std::size_t i = 0; i < parameters; ++i) {
    const std::int64_t count = where.part_elements(static_cast<int>(i), own.ranks->rank());
    detail::copy_elements(place, m.sum[i], count, s.summed);
    place += count;
  }
  s.summed = true;
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::divide_gradients(double divisor) {
  this->expect_divisor(divisor);
  const auto by = static_cast<accumulate>(divisor);
  std::size_t next = 0;
  for (auto& m : memory_.groups) {
    for (accumulate* values : m.sum) {
      const std::int64_t count = tensors_[next++].count;
      for (std::int64_t i = 0; i < count; ++i) values[i] /= by;
    }
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
double fully_sharded<Precision, Moment, Reduction, Comm>::gradient_norm(Comm* stages) {
  this->expect_gradients("gradient_norm");
  static_assert(sizeof(exact_sum) == sizeof(std::int64_t) * (exact_sum::num_digits + 1));
  exact_sum* const squares = memory_.squares;
  std::size_t first = 0;
  while (first < norm_order_.size()) {  // groups [first, last) have the same communicators
    const group<Comm>& own = groups_[index(norm_order_[first])];
    std::size_t last = first;
    for (; last < norm_order_.size(); ++last) {
      const int g = norm_order_[last];
      if (!this->same_norm(g, norm_order_[first])) break;
      squares[last].clear();
      for (int i = 0; i < layout(g).num_parameters(); ++i) {
        const tensor part = local(g, i);
        squares[last].add_squares(part.gradient, part.count);
      }
    }
    const auto sum_over = [&](Comm& comm) {
      auto* const digits = reinterpret_cast<std::int64_t*>(squares + first);
      const auto count = static_cast<std::int64_t>(last - first) * (exact_sum::num_digits + 1);
      comm.all_reduce(host_stream{}, digits, digits, count);
      for (std::size_t k = first; k < last; ++k) squares[k].carry();
    };
    sum_over(*own.ranks);
    for (Comm* comm : own.distinct) sum_over(*comm);
    first = last;
  }
  exact_sum total;
  total.clear();
  for (std::size_t k = 0; k < norm_order_.size(); ++k) total.add(squares[k]);
  const bool own_finite = total.not_finite == 0;
  if (stages != nullptr) {
    auto* const digits = reinterpret_cast<std::int64_t*>(&total);
    stages->all_reduce(host_stream{}, digits, digits, exact_sum::num_digits + 1);
    total.carry();
  }
  if (total.not_finite > 0) {
    std::ostringstream text;
    text << "gradients are not finite:";
    if (own_finite) text << " in another pipeline stage (" << total.not_finite << " elements)";
    for (std::size_t k = 0; k < norm_order_.size(); ++k) {
      if (squares[k].not_finite > 0) {
        text << " group '" << groups_[index(norm_order_[k])].name << "' (" << squares[k].not_finite << " elements)";
      }
    }
    throw error(text.str());
  }
  return std::sqrt(total.value());
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::step(const adamw_options& choices, std::int64_t t, double rate,
                                                             double scale) {
  [[maybe_unused]] const nvtx_range range("tessera::shard::fully_sharded::step");
  this->expect_step();
  adamw(host_stream{}, choices, t, rate, scale, std::span<const tensor>(tensors_));
  this->end_step();
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::abandon_step() {
  for (int g = 0; g < num_groups(); ++g) {
    group_state& s = states_[index(g)];
    if (s.gather == gather_state::under_way) {
      try {
        queue_->wait(g);
      } catch (const std::exception&) {  // what failed is given up anyway
      }
    }
  }
  this->forget_step();
}

}  // namespace shard
TESSERA_NAMESPACE_END
