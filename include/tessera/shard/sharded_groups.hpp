// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Groups of sharded parameters: who takes part, where everything lies, and what state the groups are in. The same in
/// both memory spaces; `fully_sharded` adds the operations.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/precision.hpp>
#include <tessera/layout/boxes.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/detail/sharded_memory.hpp>
#include <tessera/shard/group_layout.hpp>
#include <tessera/shard/memory.hpp>
#include <tessera/shard/parameter.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

/// Parameters that one all-gather fetches and one reduce-scatter sums, and the ranks that take part. Dense parameters
/// are divided over the data-parallel ranks, experts over the ranks that hold the same experts (`efsdp`): two groups
/// with different communicators. All ranks of a communicator have the same groups in the same order. Communicators
/// outlive the `fully_sharded` that uses them.
template <communicator Comm>
struct group {
  std::string name = {};                   ///< For messages.
  std::vector<parameter> parameters = {};  ///< What is divided.
  Comm* ranks = nullptr;                   ///< Ranks that divide the parameters.
  Comm* replicas = nullptr;                ///< HSDP: ranks that hold the same parts; null: none.

  /// A communicator of the same ranks in the same order as `ranks`, for communication in the background: a thread on
  /// the host, streams on a device; null: nothing runs in the background. Either all groups have one or none has.
  /// Groups with the same `ranks` may share one.
  Comm* gather = nullptr;

  /// Ranks that hold other parameters under this group, such as expert-parallel ranks: their sums of squares belong to
  /// the same gradient norm. Axes one after another, each a communicator; not the replicas, not pipeline stages.
  std::vector<Comm*> distinct = {};

  std::int64_t chunks = 1;            ///< Gradient contributions of this rank; more than 1 with `reduction::ordered`.
  std::int64_t max_chunks = 1;        ///< The most that any rank has, the same on all ranks.
  bool reshard_after_forward = true;  ///< See `group_shape`.

  /// `[replicas, ranks]`: chunks of every rank, the same list on all of them. Device memory with `reduction::ordered`
  /// alone needs it (the host half asks the other ranks, which there would make the host wait for the device). Empty:
  /// every rank has `chunks`.
  std::vector<std::int64_t> chunks_of_ranks = {};
};

/// What the memory of a group depends on. @param g The group; its communicators are asked for rank and size only.
template <communicator Comm>
group_shape shape_of(const group<Comm>& g) {
  TESSERA_EXPECTS(g.ranks != nullptr, "shard group '" << g.name << "' has no communicator");
  return {g.parameters, g.ranks->size(),        g.ranks->rank(), g.replicas == nullptr ? 1 : g.replicas->size(),
          g.max_chunks, g.reshard_after_forward};
}

/// One array of a rank's state, for checkpoints. Over all ranks, the parts of replica 0 cover the logical tensor.
struct state_array {
  std::string name;             ///< Parameter's name; `.master`, `.exp_avg` or `.exp_avg_sq` appended for the others.
  std::string_view dtype;       ///< As `dtype_name` spells it.
  box whole;                    ///< The logical tensor.
  std::vector<held_box> parts;  ///< Which elements lie where in `data`; none where the rank's part is empty.
  int replica = 0;              ///< Which of the ranks with equal parts this one is.
  int num_replicas = 1;         ///< How many there are.
  void* data = nullptr;         ///< Packed part, in the memory of the state; null where it is empty.
};

/// Memory of `fully_sharded` on one rank: a pure function, for planning without any communicator. The peak of gathered
/// parameters is `sum of (groups that stay) + sum over slots of (largest group of the slot)`; the k-th group that does
/// not stay has slot `k mod (prefetch + 1)`.
/// @tparam Precision Element types. @tparam Moment Type of the moments. @tparam Reduction How gradients are summed.
/// @tparam Space     Where everything lies: in device memory kernels need tables.
/// @param shapes  The groups as this rank sees them. @param choices Prefetch and accumulation.
/// @throws invalid_argument for numbers out of range.
template <precision_policy Precision, storage_type Moment, class Reduction, memory_space Space = space::host>
memory_sizes memory_of(std::span<const group_shape> shapes, const options& choices);

/// What `fully_sharded` of both memory spaces has in common. Pointers are in the communicator's space. Nothing here
/// communicates or touches memory of parameters.
/// @tparam Precision Storage: parameters on the wire and in use. Accumulate: masters, sums. Gradient: whole gradients.
/// @tparam Moment    Type of both moments. @tparam Reduction How gradients are summed. @tparam Comm Communicator.
template <precision_policy Precision, storage_type Moment, class Reduction, communicator Comm>
class sharded_groups {
 public:
  using space = typename Comm::space;                        ///< Where everything lies.
  using storage = typename Precision::storage;               ///< Type of parameters.
  using accumulate = typename Precision::accumulate;         ///< Type of masters and summed gradients.
  using gradient = typename Precision::gradient;             ///< Type of whole gradients.
  using tensor = adamw_tensor<storage, accumulate, Moment>;  ///< This rank's part of one parameter.

  sharded_groups(const sharded_groups&) = delete;
  sharded_groups& operator=(const sharded_groups&) = delete;

  /// Number of groups.
  int num_groups() const { return static_cast<int>(groups_.size()); }
  /// Who holds what of group `g`.
  const group_layout& layout(int g) const { return layouts_[index(g)]; }
  /// Bytes in use, as `memory_of` gives them.
  const memory_sizes& memory() const { return memory_.sizes; }

  /// This rank's part of parameter `i` of group `g`: its elements, packed in the box `layout(g).part(i, rank)`. The
  /// gradient is that of the last `reduce`. @param g Group. @param i Parameter.
  tensor local(int g, int i) const;

  /// The arrays of a checkpoint: for each parameter itself, `.master` (where it has a type of its own), `.exp_avg`,
  /// `.exp_avg_sq`. @param g Group.
  std::vector<state_array> state_arrays(int g) const;

  /// Whole parameter `i` of the gathered group `g`, packed, aligned to `memory_alignment`. Read-only by intent.
  std::span<storage> full(int g, int i);

  /// Where backward writes the whole gradient of a parameter; not initialised. See `gradient_mode`.
  /// @param g Group. @param i Parameter. @param chunk Contribution, in `[0, chunks)` of the group.
  /// @throws invalid_argument if the memory holds gradients of another group that are not reduced yet.
  std::span<gradient> full_gradient(int g, int i, std::int64_t chunk = 0);
  /// How to write it: `overwrite`, or `accumulate` while unreduced gradients of earlier micro-batches are there.
  write gradient_mode(int g) const { return states_[index(g)].unreduced ? write::accumulate : write::overwrite; }

  /// Whether `reduce` communicates. @throws invalid_argument for false without `options::accumulate_unsharded`.
  void set_requires_gradient_sync(bool required);
  /// Whether `reduce` sums over replicas, or keeps sums of this replica alone. Must be on in the last micro-batch. With
  /// `reduction::ordered` and 2 or more replicas, kept chunks add up over micro-batches before they are summed: where
  /// gradients have the type of sums, the bits are those of `set_requires_gradient_sync(false)`. With one replica this
  /// changes nothing: each micro-batch is summed by itself, which rounds differently.
  void set_requires_all_reduce(bool required) { all_reduce_ = required; }

 protected:
  /// What a group's parameters are.
  enum class gather_state {
    absent,     ///< Divided.
    under_way,  ///< Being gathered.
    gathered,   ///< Whole.
  };

  /// What changes during a step.
  struct group_state {
    gather_state gather = gather_state::absent;  ///< What the parameters are.
    bool unreduced = false;                      ///< Whole gradients wait for a reduction.
    bool touched = false;                        ///< Whole gradients were asked for since the last `reduce`.
    bool half_reduced = false;                   ///< `rows` wait for the all-reduce.
    bool summed = false;                         ///< There are gradients for `step`.
    std::int64_t num_rows = 0;                   ///< Rows that wait.
    int slot = -1;                               ///< Place of gathered parameters, -1: memory of its own.
  };

  /// Checks and lays out. @param groups,choices,state,step As for `fully_sharded`.
  sharded_groups(std::vector<group<Comm>> groups, const options& choices, state_memory state, step_memory step);
  ~sharded_groups() = default;

  /// `g` as an index. @throws invalid_argument if there is no such group.
  std::size_t index(int g) const;
  /// @throws invalid_argument if there is no such parameter. @param g Group. @param i Parameter.
  void expect_parameter(int g, int i) const;
  /// @throws invalid_argument if a group's gradients are not all reduced. @param what Who asks.
  void expect_gradients(const char* what) const;
  /// Checks `divide_gradients`. @param divisor Given to it.
  void expect_divisor(double divisor) const;
  /// Checks `set`. @param g Group. @param i Parameter. @param count Elements that are given.
  void expect_settable(int g, int i, std::size_t count) const;
  /// Takes a group's slot. @param g Group. @return false if it is gathered or under way.
  bool take_slot(int g);
  /// Gives it back. @param s State of the group.
  void free_slot(group_state& s);
  /// Checks and does what `release` means. @param g Group.
  void give_back(int g);
  /// Checks `reduce`. @param g Group. @return false if the gradients are only kept.
  bool starts_reduction(int g);
  /// The whole gradients of a group are read. @param g Group.
  void gradients_are_read(int g);
  /// Checks `step`: all gradients are there, and nothing is gathered that would be stale.
  void expect_step() const;
  /// What `step` changes.
  void end_step();
  /// Forgets everything of this step.
  void forget_step();
  /// Whether communication runs in the background.
  bool background() const { return !groups_.empty() && groups_.front().gather != nullptr; }
  /// Whether a group's sum goes over replicas. @param g Group.
  bool replicated(int g) const {
    return groups_[index(g)].replicas != nullptr && groups_[index(g)].replicas->size() > 1;
  }
  /// Rows between the steps of a reduction, at most. @param g Group.
  std::int64_t max_rows(int g) const {
    return Reduction::rows(layout(g).ranks(), Reduction::keeps_chunks ? groups_[index(g)].max_chunks : std::int64_t{1});
  }
  /// Whether groups have the same part in the gradient norm. @param a,b Groups.
  bool same_norm(int a, int b) const {
    return groups_[index(a)].ranks == groups_[index(b)].ranks &&
           groups_[index(a)].distinct == groups_[index(b)].distinct;
  }

  std::vector<group<Comm>> groups_;                   ///< The groups.
  options choices_;                                   ///< The choices.
  std::vector<group_layout> layouts_;                 ///< Of each group.
  detail::sharded_memory<Precision, Moment> memory_;  ///< Where everything lies.
  std::vector<group_state> states_;                   ///< Of each group.
  std::vector<int> slots_;                            ///< Group in each slot, -1: none.
  int gradient_holder_ = -1;                          ///< Whose whole gradients are in the shared memory, -1: none.
  std::vector<int> norm_order_;                       ///< Groups, those with the same communicators next to each other.
  std::vector<tensor> tensors_;                       ///< All parts, for `step`.
  bool gradient_sync_ = true;                         ///< Whether `reduce` communicates.
  bool all_reduce_ = true;                            ///< Whether it sums over replicas.

 private:
  bool shares_gradients(int g) const {
    return groups_[index(g)].reshard_after_forward && !choices_.accumulate_unsharded;
  }
};

}  // namespace shard
TESSERA_NAMESPACE_END

#include <tessera/shard/detail/sharded_groups.hpp>
