// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of `sharded_groups.hpp`.

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include <tessera/core/error.hpp>
#include <tessera/shard/sharded_groups.hpp>

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

template <precision_policy Precision, storage_type Moment, class Reduction, memory_space Space>
memory_sizes memory_of(std::span<const group_shape> shapes, const options& choices) {
  detail::expect_shapes(shapes, choices);
  const std::vector<group_layout> layouts = detail::layouts_of(shapes);
  detail::sharded_memory<Precision, Moment> memory;
  memory_builder state, step;
  detail::lay_out_state<Space>(memory, state, shapes, layouts);
  detail::lay_out_step<Precision, Moment, Reduction>(memory, step, shapes, layouts, choices);
  return memory.sizes;
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
sharded_groups<Precision, Moment, Reduction, Comm>::sharded_groups(std::vector<group<Comm>> groups,
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
  choices_.prefetch = (std::min)(choices_.prefetch, num_groups());  // more is the same, and sums with it are small
  layouts_ = detail::layouts_of(shapes);
  memory_builder state_builder(state, "sharded state memory");
  memory_builder step_builder(step, "sharded step memory");
  detail::lay_out_state<space>(memory_, state_builder, shapes, layouts_);
  detail::lay_out_step<Precision, Moment, Reduction>(memory_, step_builder, shapes, layouts_, choices_);

  states_.resize(groups_.size());
  slots_.assign(static_cast<std::size_t>(detail::num_slots(shapes, choices_)), -1);
  int turn = 0;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    if (groups_[g].reshard_after_forward) states_[g].slot = turn++ % static_cast<int>(slots_.size());
    for (int i = 0; i < layouts_[g].num_parameters(); ++i) tensors_.push_back(local(static_cast<int>(g), i));
  }
  for (int g = 0; g < num_groups(); ++g) {  // next to the first group with the same communicators
    const auto same = [&](int other) { return same_norm(g, other); };
    auto place = std::find_if(norm_order_.begin(), norm_order_.end(), same);
    while (place != norm_order_.end() && same(*place)) ++place;
    norm_order_.insert(place, g);
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
std::size_t sharded_groups<Precision, Moment, Reduction, Comm>::index(int g) const {
  TESSERA_EXPECTS(g >= 0 && g < num_groups(), "there is no shard group " << g << ", there are " << num_groups());
  return static_cast<std::size_t>(g);
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::expect_parameter(int g, int i) const {
  const int count = layouts_[index(g)].num_parameters();
  TESSERA_EXPECTS(i >= 0 && i < count,
                  "shard group '" << groups_[index(g)].name << "' has no parameter " << i << ", it has " << count);
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::expect_gradients(const char* what) const {
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

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::expect_divisor(double divisor) const {
  // in the type that divides, where 1e-300 may be 0
  constexpr double least = (std::numeric_limits<accumulate>::min)(), most = (std::numeric_limits<accumulate>::max)();
  TESSERA_EXPECTS(divisor >= least && divisor <= most,
                  "divide_gradients: divisor = " << divisor << ", it must be between " << least << " and " << most);
  expect_gradients("divide_gradients");
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::expect_settable(int g, int i, std::size_t count) const {
  expect_parameter(g, i);
  const group_state& s = states_[index(g)];
  TESSERA_EXPECTS(static_cast<std::int64_t>(count) == layout(g).elements(i),
                  "parameter '" << layout(g).at(i).name << "' has " << layout(g).elements(i) << " elements, " << count
                                << " are given");
  TESSERA_EXPECTS(s.gather == gather_state::absent || (s.gather == gather_state::gathered && s.slot < 0),
                  "parameter '" << layout(g).at(i).name << "' cannot be set while group '" << groups_[index(g)].name
                                << "' is gathered: call release first");
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
auto sharded_groups<Precision, Moment, Reduction, Comm>::local(int g, int i) const -> tensor {
  expect_parameter(g, i);
  const auto& m = memory_.groups[index(g)];
  const auto p = static_cast<std::size_t>(i);
  return {m.parameter[p],        m.master[p],     m.sum[p],
          m.exp_avg[p],          m.exp_avg_sq[p], layout(g).part_elements(i, groups_[index(g)].ranks->rank()),
          layout(g).at(i).decays};
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
std::vector<state_array> sharded_groups<Precision, Moment, Reduction, Comm>::state_arrays(int g) const {
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

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
auto sharded_groups<Precision, Moment, Reduction, Comm>::full(int g, int i) -> std::span<storage> {
  expect_parameter(g, i);
  TESSERA_EXPECTS(states_[index(g)].gather == gather_state::gathered,
                  "parameter '" << layout(g).at(i).name << "' is not whole: call begin_gather and end_gather of group '"
                                << groups_[index(g)].name << "' first");
  return {memory_.groups[index(g)].full[static_cast<std::size_t>(i)], static_cast<std::size_t>(layout(g).elements(i))};
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
auto sharded_groups<Precision, Moment, Reduction, Comm>::full_gradient(int g, int i, std::int64_t chunk)
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

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::set_requires_gradient_sync(bool required) {
  TESSERA_EXPECTS(required || choices_.accumulate_unsharded,
                  "set_requires_gradient_sync(false) needs memory for the whole gradients of every group: set "
                  "options::accumulate_unsharded");
  gradient_sync_ = required;
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
bool sharded_groups<Precision, Moment, Reduction, Comm>::take_slot(int g) {
  group_state& s = states_[index(g)];
  if (s.gather != gather_state::absent) return false;
  if (s.slot >= 0) {
    int& holder = slots_[static_cast<std::size_t>(s.slot)];
    TESSERA_EXPECTS(holder < 0, "shard group '" << groups_[index(g)].name << "' would take the memory of group '"
                                                << groups_[index(holder)].name
                                                << "', which is not released; with prefetch = " << choices_.prefetch
                                                << ", " << choices_.prefetch + 1
                                                << " neighbouring groups can be gathered at a time");
    holder = g;
  }
  s.gather = gather_state::under_way;
  return true;
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::free_slot(group_state& s) {
  if (s.slot >= 0 && s.gather != gather_state::absent) slots_[static_cast<std::size_t>(s.slot)] = -1;
  s.gather = gather_state::absent;
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::give_back(int g) {
  group_state& s = states_[index(g)];
  TESSERA_EXPECTS(s.gather == gather_state::gathered,
                  "release of shard group '"
                      << groups_[index(g)].name << "', which is "
                      << (s.gather == gather_state::absent ? "not gathered" : "under way: call end_gather first"));
  if (s.slot >= 0) free_slot(s);
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
bool sharded_groups<Precision, Moment, Reduction, Comm>::starts_reduction(int g) {
  const group<Comm>& own = groups_[index(g)];
  group_state& s = states_[index(g)];
  TESSERA_EXPECTS(s.touched || s.unreduced || own.chunks == 0 || layout(g).num_parameters() == 0,
                  "reduce of shard group '" << own.name << "', whose gradients nobody has written");
  if (gradient_sync_) return true;
  s.unreduced = true;
  s.touched = false;
  return false;
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::gradients_are_read(int g) {
  states_[index(g)].touched = states_[index(g)].unreduced = false;
  if (gradient_holder_ == g) gradient_holder_ = -1;
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::expect_step() const {
  expect_gradients("step");
  for (int g = 0; g < num_groups(); ++g) {
    const group_state& s = states_[index(g)];
    TESSERA_EXPECTS(s.gather == gather_state::absent || (s.slot < 0 && s.gather == gather_state::gathered),
                    "step: shard group '" << groups_[index(g)].name
                                          << "' is gathered or under way, its parameters would be stale: call release");
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::end_step() {
  for (group_state& s : states_) {
    s.gather = gather_state::absent;
    s.summed = false;
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
void sharded_groups<Precision, Moment, Reduction, Comm>::forget_step() {
  for (group_state& s : states_) {
    free_slot(s);
    s.unreduced = s.touched = s.half_reduced = s.summed = false;
  }
  gradient_holder_ = -1;
}

}  // namespace shard
TESSERA_NAMESPACE_END
