// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// ZeRO-3 / FSDP and HSDP: parameters, gradients and optimizer state divided among ranks, whole only while in use.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/precision.hpp>
#include <tessera/layout/boxes.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/detail/gather_queue.hpp>
#include <tessera/shard/detail/sharded_memory.hpp>
#include <tessera/shard/exact_sum.hpp>
#include <tessera/shard/group_layout.hpp>
#include <tessera/shard/memory.hpp>
#include <tessera/shard/parameter.hpp>
#include <tessera/shard/reduction.hpp>

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

  /// A communicator of the same ranks in the same order as `ranks`, for all-gathers in the background; null: the
  /// caller's thread gathers. Either all groups have one or none has. Groups with the same `ranks` may share one.
  Comm* gather = nullptr;

  /// Ranks that hold other parameters under this group, such as expert-parallel ranks: their sums of squares belong to
  /// the same gradient norm. Axes one after another, each a communicator; not the replicas, not pipeline stages.
  std::vector<Comm*> distinct = {};

  std::int64_t chunks = 1;            ///< Gradient contributions of this rank; more than 1 with `reduction::ordered`.
  std::int64_t max_chunks = 1;        ///< The most that any rank has, the same on all ranks.
  bool reshard_after_forward = true;  ///< See `group_shape`.
};

/// What the memory of a group depends on. @param g The group; its communicators are asked for rank and size only.
template <communicator Comm>
group_shape shape_of(const group<Comm>& g) {
  TESSERA_EXPECTS(g.ranks != nullptr, "shard group '" << g.name << "' has no communicator");
  return {g.parameters, g.ranks->size(),        g.ranks->rank(), g.replicas == nullptr ? 1 : g.replicas->size(),
          g.max_chunks, g.reshard_after_forward};
}

/// Memory of `fully_sharded` on one rank: a pure function, for planning without any communicator. The peak of gathered
/// parameters is `sum of (groups that stay) + sum over slots of (largest group of the slot)`; the k-th group that does
/// not stay has slot `k mod (prefetch + 1)`.
/// @tparam Precision Element types. @tparam Moment Type of the moments. @tparam Reduction How gradients are summed.
/// @param shapes  The groups as this rank sees them. @param choices Prefetch and accumulation.
/// @throws invalid_argument for numbers out of range.
template <precision_policy Precision, storage_type Moment, class Reduction>
memory_sizes memory_of(std::span<const group_shape> shapes, const options& choices);

/// One array of a rank's state, for checkpoints. Over all ranks, the parts of replica 0 cover the logical tensor.
struct state_array {
  std::string name;             ///< Parameter's name; `.master`, `.exp_avg` or `.exp_avg_sq` appended for the others.
  std::string_view dtype;       ///< As `dtype_name` spells it.
  box whole;                    ///< The logical tensor.
  std::vector<held_box> parts;  ///< Which elements lie where in `data`; none where the rank's part is empty.
  int replica = 0;              ///< Which of the ranks with equal parts this one is.
  int num_replicas = 1;         ///< How many there are.
  void* data = nullptr;         ///< Packed part; null where it is empty.
};

/// Sharded training state of a list of groups, and its operations. All memory is the caller's.
///
///     shard::fully_sharded<precision::bf16, float, reduction::native, comm::threads> model(groups, {}, state, step);
///     model.forward([&](int g) { ... model.full(g, i) ... });           // gathers ahead, gives back behind
///     model.backward([&](int g) { ... model.full_gradient(g, i) ... });  // also reduces
///     model.divide_gradients(global_tokens);
///     const double norm = model.gradient_norm();
///     model.step(adamw, ++t, rate, clip_factor(norm, 1.0));
///
/// - **Gather**: `begin_gather(g)` starts an all-gather of the storage-type parts, `end_gather(g)` waits for it,
///   `release(g)` gives the memory back. With `group::gather`, a thread of the object does the work, in the order of
///   the calls, which must be the same on all ranks; without, `begin_gather` does it. `prefetch + 1` groups may be
///   gathered at a time. (`comm::threads` allows the thread; `comm::mpi` only where MPI was started with
///   `MPI_THREAD_MULTIPLE`.)
/// - **Reduce**: `reduce(g)` sums the whole gradients over `ranks` and `replicas` and adds the sum to this rank's part;
///   several micro-batches of a step add up. `set_requires_gradient_sync(false)` lets micro-batches add up before any
///   communication; `set_requires_all_reduce(false)` (HSDP) before the all-reduce over replicas.
/// - **Divisor**: sums are plain sums. `divide_gradients` divides those of all groups by the same number, so that
///   experts, which see the tokens of all expert-parallel ranks, are not scaled by another one: write gradients of the
///   sum of token losses, and divide by the number of tokens of the global batch.
/// - **Bits**: with `reduction::ordered` and fixed chunks, every step has the same bits for every number of shard ranks
///   and replicas; the norm and AdamW never depend on the sharding.
///
/// Collective calls (`end_gather`, `reduce`, `gradient_norm`; `begin_gather` without a gather communicator) throw
/// `comm_error` when another rank does not do its part. Host memory only for now: the requirement on `Comm` says so.
/// Calls return when done; after construction none allocates (but `state_arrays`, and communicators' own buffers).
/// The object belongs to one thread. Destroying it waits for the gather under way.
/// @tparam Precision Storage: parameters on the wire and in use. Accumulate: masters, sums. Gradient: whole gradients.
/// @tparam Moment    Type of both moments. @tparam Reduction `reduction::native` or `reduction::ordered`.
/// @tparam Comm      Communicator.
template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
class fully_sharded {
  static_assert(host_communicator<Comm>,
                "tessera::shard::fully_sharded needs a communicator of host memory. Models: comm::self<space::host>, "
                "comm::threads, comm::mpi.");
  static_assert(reduction_policy<Reduction, Comm>,
                "tessera::shard::fully_sharded needs a reduction: keeps_chunks, rows, workspace_bytes, scatter and "
                "join. Models: reduction::native, reduction::ordered.");

 public:
  using storage = typename Precision::storage;               ///< Type of parameters.
  using accumulate = typename Precision::accumulate;         ///< Type of masters and summed gradients.
  using gradient = typename Precision::gradient;             ///< Type of whole gradients.
  using tensor = adamw_tensor<storage, accumulate, Moment>;  ///< This rank's part of one parameter.

  /// Lays everything out; parameters and moments keep what is in `state`. Not collective.
  /// @param groups  What is sharded, in the order of forward. @param choices Prefetch and accumulation.
  /// @param state   At least `memory_of(...).state()` bytes; part of checkpoints. Zero-filled memory is a right start
  ///                for moments.
  /// @param step    At least `memory_of(...).step()` bytes.
  /// @throws invalid_argument if groups, choices or sizes are wrong.
  fully_sharded(std::vector<group<Comm>> groups, const options& choices, state_memory state, step_memory step);

  fully_sharded(const fully_sharded&) = delete;
  fully_sharded& operator=(const fully_sharded&) = delete;

  /// Number of groups.
  int num_groups() const { return static_cast<int>(groups_.size()); }
  /// Who holds what of group `g`.
  const group_layout& layout(int g) const { return layouts_[index(g)]; }
  /// Bytes in use, as `memory_of` gives them.
  const memory_sizes& memory() const { return memory_.sizes; }

  /// This rank's part of parameter `i` of group `g`: its elements, packed in the box `layout(g).part(i, rank)`. The
  /// gradient is that of the last `reduce`. @param g Group. @param i Parameter.
  tensor local(int g, int i);

  /// Sets this rank's part of a parameter (master and storage) from the whole one, which every rank has or computes.
  /// @param g Group. @param i Parameter. @param whole The tensor that is divided, packed.
  /// @throws invalid_argument if the size is wrong, or the group is gathered and does not stay so.
  void set(int g, int i, std::span<const accumulate> whole);

  /// Sets masters to the parameters, after a load of parameters alone.
  void masters_from_parameters();

  /// The arrays of a checkpoint: for each parameter itself, `.master` (where it has a type of its own), `.exp_avg`,
  /// `.exp_avg_sq`. @param g Group.
  std::vector<state_array> state_arrays(int g) const;

  /// Starts gathering group `g`. Nothing happens where it is gathered or under way.
  /// @throws invalid_argument naming the group whose memory it would take, when more than `prefetch + 1` are in use.
  void begin_gather(int g);
  /// Waits for it. @param g Group, after `begin_gather`. @throws comm_error; the group is not gathered then.
  void end_gather(int g);
  /// Gives the memory of a gathered group back. A group that stays gathered does so until `step`. @param g Group.
  void release(int g);
  /// Whole parameter `i` of the gathered group `g`, packed, aligned to `memory_alignment`. Read-only by intent.
  std::span<storage> full(int g, int i);

  /// Where backward writes the whole gradient of a parameter; not initialised. See `gradient_mode`.
  /// @param g Group. @param i Parameter. @param chunk Contribution, in `[0, chunks)` of the group.
  /// @throws invalid_argument if the memory holds gradients of another group that are not reduced yet.
  std::span<gradient> full_gradient(int g, int i, std::int64_t chunk = 0);
  /// How to write it: `overwrite`, or `accumulate` while unreduced gradients of earlier micro-batches are there.
  write gradient_mode(int g) const { return states_[index(g)].unreduced ? write::accumulate : write::overwrite; }

  /// Sums the whole gradients of group `g` into the ranks' parts, or, without gradient synchronisation, keeps them.
  /// Collective over the group's `ranks` and `replicas`. @throws invalid_argument if nobody wrote gradients,
  /// comm_error; after that, `abandon_step`.
  void reduce(int g);
  /// Whether `reduce` communicates. @throws invalid_argument for false without `options::accumulate_unsharded`.
  void set_requires_gradient_sync(bool required);
  /// Whether `reduce` sums over replicas, or keeps sums of this replica alone. Must be on in the last micro-batch.
  void set_requires_all_reduce(bool required) { all_reduce_ = required; }

  /// Calls `use(g)` for each group in order, gathered, with `prefetch` further groups on the way; gives groups back.
  template <class F>
  void forward(F&& use);
  /// The same in reverse order, and `reduce(g)` after `use(g)`.
  template <class F>
  void backward(F&& use);

  /// Divides the summed gradients of all groups. Not collective. @param divisor The number of tokens of the global
  /// batch, where losses are sums over tokens. @throws invalid_argument if it is not finite and positive, or a group's
  /// gradients are not all reduced.
  void divide_gradients(double divisor);

  /// The 2-norm of all gradients, each parameter counted once: exact sums of squares over each group's `ranks` and
  /// `distinct`, then over `stages`, so the bits do not depend on the sharding. Groups with the same communicators
  /// share their all-reduces; all ranks must pass the same pointers for the same groups. Collective over these
  /// communicators.
  /// @param stages Ranks of the other pipeline stages, which have groups of their own; null: there are none.
  /// @throws error on all ranks, naming the groups, if a gradient is not finite; the state is unchanged.
  double gradient_norm(Comm* stages = nullptr);

  /// AdamW on this rank's parts; writes the storage type from the masters; the gradients are used up, gathered
  /// parameters are stale and given back. Not collective.
  /// @param choices Coefficients. @param t Number of the step, from 1. @param rate Learning rate.
  /// @param scale   Factor on the gradients, such as `clip_factor` gives.
  /// @throws invalid_argument if a group's gradients are not all reduced, a group is gathered that does not stay so, or
  /// a coefficient is out of range; nothing is changed then.
  void step(const adamw_options& choices, std::int64_t t, double rate, double scale = 1.0);

  /// Forgets the gradients of this step and gives back all gathered parameters, after a failure or to skip a step.
  /// State and step number stay; waits for a gather under way, whose error is dropped. Not collective.
  void abandon_step();

 private:
  enum class gather_state { absent, under_way, gathered };

  // What changes during a step.
  struct group_state {
    gather_state gather = gather_state::absent;
    bool unreduced = false;     // whole gradients wait for a reduction
    bool touched = false;       // whole gradients were asked for since the last `reduce`
    bool half_reduced = false;  // `rows` wait for the all-reduce
    bool summed = false;        // there are gradients for `step`
    std::int64_t num_rows = 0;
    int slot = -1;  // -1: memory of its own
  };

  std::size_t index(int g) const;
  void expect_parameter(int g, int i) const;
  void expect_gradients(const char* what) const;
  void gather_now(int g);
  void free_slot(group_state& s);
  bool shares_gradients(int g) const {
    return groups_[index(g)].reshard_after_forward && !choices_.accumulate_unsharded;
  }

  std::vector<group<Comm>> groups_;
  options choices_;
  std::vector<group_layout> layouts_;
  detail::sharded_memory<Precision, Moment> memory_;
  std::vector<group_state> states_;
  std::vector<int> slots_;       // group in each slot, -1: none
  int gradient_holder_ = -1;     // group whose whole gradients are in the shared memory, -1: none
  std::vector<int> norm_order_;  // groups, those with the same communicators next to each other
  std::vector<tensor> tensors_;  // all parts, for `step`
  bool gradient_sync_ = true, all_reduce_ = true;
  std::unique_ptr<detail::gather_queue> queue_;  // last: its thread uses all of the above
};

}  // namespace shard
TESSERA_NAMESPACE_END

#include <tessera/shard/detail/fully_sharded.hpp>
