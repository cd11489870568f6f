// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of `fully_sharded.hpp`.

#include <algorithm>
#include <cmath>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>

#include <tessera/core/error.hpp>
#include <tessera/shard/fully_sharded.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

namespace detail {

inline void expect_shapes(std::span<const group_shape> shapes, const options& choices) {
  TESSERA_EXPECTS(choices.prefetch >= 0,
                  "shard::options: prefetch = " << choices.prefetch << ", it must be at least 0");
  for (const group_shape& s : shapes) {
    TESSERA_EXPECTS(s.shard_ranks >= 1 && s.shard_rank >= 0 && s.shard_rank < s.shard_ranks && s.replicas >= 1,
                    "shard group " << (&s - shapes.data()) << ": rank " << s.shard_rank << " of " << s.shard_ranks
                                   << " with " << s.replicas << " replicas is not possible");
    TESSERA_EXPECTS(s.max_chunks >= 1, "shard group " << (&s - shapes.data()) << ": max_chunks = " << s.max_chunks
                                                      << ", it must be at least 1");
  }
}

inline std::vector<group_layout> layouts_of(std::span<const group_shape> shapes) {
  std::vector<group_layout> layouts;
  for (const group_shape& s : shapes) layouts.emplace_back(s.parameters, s.shard_ranks);
  return layouts;
}

}  // namespace detail

template <precision_policy Precision, storage_type Moment, class Reduction>
memory_sizes memory_of(std::span<const group_shape> shapes, const options& choices) {
  detail::expect_shapes(shapes, choices);
  const std::vector<group_layout> layouts = detail::layouts_of(shapes);
  detail::sharded_memory<Precision, Moment> memory;
  memory_builder state, step;
  detail::lay_out_state(memory, state, shapes, layouts);
  detail::lay_out_step<Precision, Moment, Reduction>(memory, step, shapes, layouts, choices);
  return memory.sizes;
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
fully_sharded<Precision, Moment, Reduction, Comm>::fully_sharded(std::vector<group<Comm>> groups,
                                                                 const options& choices, state_memory state,
                                                                 step_memory step)
    : groups_(std::move(groups)), choices_(choices) {
  std::vector<group_shape> shapes;
  int with_gather = 0;
  for (const group<Comm>& g : groups_) {
    shapes.push_back(shape_of(g));
    TESSERA_EXPECTS(g.chunks >= 0 && g.chunks <= g.max_chunks,
                    "shard group '" << g.name << "' has " << g.chunks << " chunks, max_chunks = " << g.max_chunks);
    TESSERA_EXPECTS(Reduction::keeps_chunks || g.chunks >= 1,
                    "shard group '" << g.name << "' has no chunk: a reduction that does not keep chunks needs one");
    TESSERA_EXPECTS(g.gather == nullptr || (g.gather->size() == g.ranks->size() && g.gather->rank() == g.ranks->rank()),
                    "shard group '" << g.name << "': its gather communicator has rank " << g.gather->rank() << " of "
                                    << g.gather->size() << ", its ranks are rank " << g.ranks->rank() << " of "
                                    << g.ranks->size());
    with_gather += g.gather == nullptr ? 0 : 1;
  }
  TESSERA_EXPECTS(with_gather == 0 || with_gather == num_groups(),
                  "of " << num_groups() << " shard groups " << with_gather
                        << " have a gather communicator: give one to all groups or to none");
  detail::expect_shapes(shapes, choices_);
  layouts_ = detail::layouts_of(shapes);
  memory_builder state_builder(state, "sharded state memory");
  memory_builder step_builder(step, "sharded step memory");
  detail::lay_out_state(memory_, state_builder, shapes, layouts_);
  detail::lay_out_step<Precision, Moment, Reduction>(memory_, step_builder, shapes, layouts_, choices_);

  states_.resize(groups_.size());
  slots_.assign(static_cast<std::size_t>(detail::num_slots(shapes, choices_)), -1);
  int turn = 0;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    if (groups_[g].reshard_after_forward) states_[g].slot = turn++ % static_cast<int>(slots_.size());
    for (int i = 0; i < layouts_[g].num_parameters(); ++i) tensors_.push_back(local(static_cast<int>(g), i));
  }
  for (int g = 0; g < num_groups(); ++g) {  // next to the first group with the same communicators
    const auto same = [&](int other) {
      const group<Comm>&a = groups_[index(g)], &b = groups_[index(other)];
      return a.ranks == b.ranks && a.distinct == b.distinct;
    };
    auto place = std::find_if(norm_order_.begin(), norm_order_.end(), same);
    while (place != norm_order_.end() && same(*place)) ++place;
    norm_order_.insert(place, g);
  }
  if (with_gather > 0) {
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
std::size_t fully_sharded<Precision, Moment, Reduction, Comm>::index(int g) const {
  TESSERA_EXPECTS(g >= 0 && g < num_groups(), "there is no shard group " << g << ", there are " << num_groups());
  return static_cast<std::size_t>(g);
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::expect_parameter(int g, int i) const {
  const int count = layouts_[index(g)].num_parameters();
  TESSERA_EXPECTS(i >= 0 && i < count,
                  "shard group '" << groups_[index(g)].name << "' has no parameter " << i << ", it has " << count);
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
auto fully_sharded<Precision, Moment, Reduction, Comm>::local(int g, int i) -> tensor {
  expect_parameter(g, i);
  const auto& m = memory_.groups[index(g)];
  const auto p = static_cast<std::size_t>(i);
  return {m.parameter[p],        m.master[p],     m.sum[p],
          m.exp_avg[p],          m.exp_avg_sq[p], layout(g).part_elements(i, groups_[index(g)].ranks->rank()),
          layout(g).at(i).decays};
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::set(int g, int i, std::span<const accumulate> whole) {
  expect_parameter(g, i);
  const group<Comm>& own = groups_[index(g)];
  group_state& s = states_[index(g)];
  TESSERA_EXPECTS(static_cast<std::int64_t>(whole.size()) == layout(g).elements(i),
                  "parameter '" << layout(g).at(i).name << "' has " << layout(g).elements(i) << " elements, "
                                << whole.size() << " are given");
  TESSERA_EXPECTS(s.gather == gather_state::absent || (s.gather == gather_state::gathered && s.slot < 0),
                  "parameter '" << layout(g).at(i).name << "' cannot be set while group '" << own.name
                                << "' is gathered: call release first");
  s.gather = gather_state::absent;  // what stays gathered would be stale
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

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
std::vector<state_array> fully_sharded<Precision, Moment, Reduction, Comm>::state_arrays(int g) const {
  const group<Comm>& own = groups_[index(g)];
  const auto& m = memory_.groups[index(g)];
  std::vector<state_array> arrays;
  for (int i = 0; i < layout(g).num_parameters(); ++i) {
    const auto p = static_cast<std::size_t>(i);
    const auto add = [&](const char* suffix, auto* data) {
      arrays.push_back({layout(g).at(i).name + suffix, dtype_name<std::remove_pointer_t<decltype(data)>>(),
                        layout(g).at(i).whole, layout(g).logical_part(i, own.ranks->rank()),
                        own.replicas == nullptr ? 0 : own.replicas->rank(),
                        own.replicas == nullptr ? 1 : own.replicas->size(), data});
    };
    add("", m.parameter[p]);
    if constexpr (!std::is_same_v<storage, accumulate>) add(".master", m.master[p]);
    add(".exp_avg", m.exp_avg[p]);
    add(".exp_avg_sq", m.exp_avg_sq[p]);
  }
  return arrays;
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
void fully_sharded<Precision, Moment, Reduction, Comm>::free_slot(group_state& s) {
  if (s.slot >= 0 && s.gather != gather_state::absent) slots_[static_cast<std::size_t>(s.slot)] = -1;
  s.gather = gather_state::absent;
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::begin_gather(int g) {
  group_state& s = states_[index(g)];
  if (s.gather != gather_state::absent) return;
  if (s.slot >= 0) {
    int& holder = slots_[static_cast<std::size_t>(s.slot)];
    TESSERA_EXPECTS(holder < 0, "shard group '" << groups_[index(g)].name << "' would take the memory of group '"
                                                << groups_[index(holder)].name
                                                << "', which is not released; with prefetch = " << choices_.prefetch
                                                << ", " << choices_.prefetch + 1
                                                << " neighbouring groups can be gathered at a time");
    holder = g;
  }
  if (queue_) {
    s.gather = gather_state::under_way;
    queue_->post(g);
    return;
  }
  s.gather = gather_state::under_way;
  try {
    gather_now(g);
  } catch (...) {
    free_slot(s);
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
    free_slot(s);
    throw;
  }
  s.gather = gather_state::gathered;
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::release(int g) {
  group_state& s = states_[index(g)];
  TESSERA_EXPECTS(s.gather == gather_state::gathered,
                  "release of shard group '"
                      << groups_[index(g)].name << "', which is "
                      << (s.gather == gather_state::absent ? "not gathered" : "under way: call end_gather first"));
  if (s.slot >= 0) free_slot(s);
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
auto fully_sharded<Precision, Moment, Reduction, Comm>::full(int g, int i) -> std::span<storage> {
  expect_parameter(g, i);
  TESSERA_EXPECTS(states_[index(g)].gather == gather_state::gathered,
                  "parameter '" << layout(g).at(i).name << "' is not whole: call begin_gather and end_gather of group '"
                                << groups_[index(g)].name << "' first");
  return {memory_.groups[index(g)].full[static_cast<std::size_t>(i)], static_cast<std::size_t>(layout(g).elements(i))};
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
auto fully_sharded<Precision, Moment, Reduction, Comm>::full_gradient(int g, int i, std::int64_t chunk)
    -> std::span<gradient> {
  expect_parameter(g, i);
  const group<Comm>& own = groups_[index(g)];
  TESSERA_EXPECTS(chunk >= 0 && chunk < own.chunks,
                  "shard group '" << own.name << "' has no chunk " << chunk << ", it has " << own.chunks);
  if (shares_gradients(g)) {
    TESSERA_EXPECTS(
        gradient_holder_ < 0 || gradient_holder_ == g,
        "whole gradients of shard group '"
            << own.name << "' would overwrite those of group '" << groups_[index(gradient_holder_)].name
            << "', which are not reduced yet; options::accumulate_unsharded gives each group its own memory");
    gradient_holder_ = g;
  }
  states_[index(g)].touched = true;
  const auto place = static_cast<std::size_t>(chunk * layout(g).num_parameters() + i);
  return {memory_.groups[index(g)].contribution[place], static_cast<std::size_t>(layout(g).elements(i))};
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::set_requires_gradient_sync(bool required) {
  TESSERA_EXPECTS(required || choices_.accumulate_unsharded,
                  "set_requires_gradient_sync(false) needs memory for the whole gradients of every group: set "
                  "options::accumulate_unsharded");
  gradient_sync_ = required;
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::reduce(int g) {
  group<Comm>& own = groups_[index(g)];
  group_state& s = states_[index(g)];
  auto& m = memory_.groups[index(g)];
  const group_layout& where = layout(g);
  TESSERA_EXPECTS(s.touched || s.unreduced || own.chunks == 0 || where.num_parameters() == 0,
                  "reduce of shard group '" << own.name << "', whose gradients nobody has written");
  if (!gradient_sync_) {
    s.unreduced = true;
    s.touched = false;
    return;
  }
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
  const bool replicated = own.replicas != nullptr && own.replicas->size() > 1;
  const std::int64_t max_rows =
      Reduction::rows(where.ranks(), Reduction::keeps_chunks ? own.max_chunks : std::int64_t{1});
  accumulate* rows = replicated && !s.half_reduced ? m.rows : memory_.rows;
  const std::int64_t num_rows =
      Reduction::scatter(stream, *own.ranks, static_cast<const accumulate*>(memory_.packed),
                         Reduction::keeps_chunks ? own.chunks : 1, row, rows, max_rows, memory_.workspace);
  if (s.half_reduced) {
    TESSERA_EXPECTS(num_rows == s.num_rows, "shard group '" << own.name << "' has " << num_rows
                                                            << " chunks in this micro-batch and had " << s.num_rows
                                                            << " in the last");
    detail::copy_elements(rows, m.rows, num_rows * row, true);
    rows = m.rows;
  }
  s.touched = s.unreduced = false;
  if (gradient_holder_ == g) gradient_holder_ = -1;
  if (replicated) {
    s.num_rows = num_rows;
    s.half_reduced = true;
    if (!all_reduce_) return;
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
void fully_sharded<Precision, Moment, Reduction, Comm>::expect_gradients(const char* what) const {
  for (int g = 0; g < num_groups(); ++g) {
    const group_state& s = states_[index(g)];
    const char* reason = nullptr;
    if (!s.summed) reason = "no gradients: call reduce";
    if (s.half_reduced)
      reason =
          "gradients that are not summed over replicas: call set_requires_all_reduce(true) before "
          "the last reduce";
    if (s.touched || s.unreduced)
      reason =
          "gradients that are not reduced: call set_requires_gradient_sync(true) before "
          "the last reduce";
    TESSERA_EXPECTS(reason == nullptr, what << ": shard group '" << groups_[index(g)].name << "' has " << reason);
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::divide_gradients(double divisor) {
  TESSERA_EXPECTS(std::isfinite(divisor) && divisor > 0,
                  "divide_gradients: divisor = " << divisor << ", it must be finite and positive");
  expect_gradients("divide_gradients");
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
  expect_gradients("gradient_norm");
  static_assert(sizeof(exact_sum) == sizeof(std::int64_t) * (exact_sum::num_digits + 1));
  exact_sum* const squares = memory_.squares;
  std::size_t first = 0;
  while (first < norm_order_.size()) {  // groups [first, last) have the same communicators
    const group<Comm>& own = groups_[index(norm_order_[first])];
    std::size_t last = first;
    for (; last < norm_order_.size(); ++last) {
      const int g = norm_order_[last];
      if (groups_[index(g)].ranks != own.ranks || groups_[index(g)].distinct != own.distinct) break;
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
  expect_gradients("step");
  for (int g = 0; g < num_groups(); ++g) {
    const group_state& s = states_[index(g)];
    TESSERA_EXPECTS(s.gather == gather_state::absent || (s.slot < 0 && s.gather == gather_state::gathered),
                    "step: shard group '" << groups_[index(g)].name
                                          << "' is gathered or under way, its parameters would be stale: call release");
  }
  adamw(host_stream{}, choices, t, rate, scale, std::span<const tensor>(tensors_));
  for (group_state& s : states_) {
    s.gather = gather_state::absent;
    s.summed = false;
  }
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
    free_slot(s);
    s.unreduced = s.touched = s.half_reduced = s.summed = false;
  }
  gradient_holder_ = -1;
}

}  // namespace shard
TESSERA_NAMESPACE_END
