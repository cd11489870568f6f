// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// ZeRO-3 / FSDP and HSDP: parameters, gradients and optimizer state divided among ranks, whole only while in use.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/precision.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/detail/gather_queue.hpp>
#include <tessera/shard/exact_sum.hpp>
#include <tessera/shard/memory.hpp>
#include <tessera/shard/reduction.hpp>
#include <tessera/shard/sharded_groups.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

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
///   and replicas (after `set_requires_all_reduce(false)` for every number from 2 on, one replica rounds differently);
///   the norm and AdamW never depend on the sharding.
///
/// Collective calls (`end_gather`, `reduce`, `gradient_norm`; `begin_gather` without a gather communicator) throw
/// `comm_error` when another rank does not do its part. Calls return when done; after construction none allocates (but
/// `state_arrays`, and communicators' own buffers). The object belongs to one thread. Destroying it waits for the
/// gather under way.
///
/// This is the half of host memory. With a communicator of device memory the specialisation in
/// `fully_sharded_device.hpp` is chosen: the same calls with a stream first, which enqueue.
/// @tparam Precision Storage: parameters on the wire and in use. Accumulate: masters, sums. Gradient: whole gradients.
/// @tparam Moment    Type of both moments. @tparam Reduction `reduction::native` or `reduction::ordered`.
/// @tparam Comm      Communicator.
template <precision_policy Precision, storage_type Moment, class Reduction, class Comm>
class fully_sharded : public sharded_groups<Precision, Moment, Reduction, Comm> {
  static_assert(host_communicator<Comm>,
                "tessera::shard::fully_sharded needs a communicator. Models: comm::self<Space>, comm::threads, "
                "comm::mpi, comm::nccl.");
  static_assert(reduction_policy<Reduction, Comm>,
                "tessera::shard::fully_sharded needs a reduction: keeps_chunks, rows, workspace_bytes, scatter and "
                "join. Models: reduction::native, reduction::ordered.");
  using base = sharded_groups<Precision, Moment, Reduction, Comm>;
  using gather_state = typename base::gather_state;
  using group_state = typename base::group_state;

 public:
  using storage = typename base::storage;        ///< Type of parameters.
  using accumulate = typename base::accumulate;  ///< Type of masters and summed gradients.
  using gradient = typename base::gradient;      ///< Type of whole gradients.
  using tensor = typename base::tensor;          ///< This rank's part of one parameter.
  using base::layout;
  using base::local;
  using base::num_groups;

  /// Lays everything out; parameters and moments keep what is in `state`. Not collective.
  /// @param groups  What is sharded, in the order of forward. @param choices Prefetch and accumulation.
  /// @param state   At least `memory_of(...).state()` bytes; part of checkpoints. Zero-filled memory is a right start
  ///                for moments.
  /// @param step    At least `memory_of(...).step()` bytes.
  /// @throws invalid_argument if groups, choices or sizes are wrong.
  fully_sharded(std::vector<group<Comm>> groups, const options& choices, state_memory state, step_memory step);

  /// Sets this rank's part of a parameter (master and storage) from the whole one, which every rank has or computes.
  /// @param g Group. @param i Parameter. @param whole The tensor that is divided, packed.
  /// @throws invalid_argument if the size is wrong, or the group is gathered and does not stay so.
  void set(int g, int i, std::span<const accumulate> whole);

  /// Sets masters to the parameters, after a load of parameters alone.
  void masters_from_parameters();

  /// Starts gathering group `g`. Nothing happens where it is gathered or under way.
  /// @throws invalid_argument naming the group whose memory it would take, when more than `prefetch + 1` are in use.
  void begin_gather(int g);
  /// Waits for it. @param g Group, after `begin_gather`. @throws comm_error; the group is not gathered then.
  void end_gather(int g);
  /// Gives the memory of a gathered group back. A group that stays gathered does so until `step`. @param g Group.
  void release(int g) { this->give_back(g); }
  /// Sums the whole gradients of group `g` into the ranks' parts, or, without gradient synchronisation, keeps them.
  /// Collective over the group's `ranks` and `replicas`. @throws invalid_argument if nobody wrote gradients,
  /// comm_error; after that, `abandon_step`.
  void reduce(int g);
  /// Calls `use(g)` for each group in order, gathered, with `prefetch` further groups on the way; gives groups back.
  template <class F>
  void forward(F&& use);
  /// The same in reverse order, and `reduce(g)` after `use(g)`.
  template <class F>
  void backward(F&& use);

  /// Divides the summed gradients of all groups. Not collective. @param divisor The number of tokens of the global
  /// batch, where losses are sums over tokens. @throws invalid_argument if it is not a normal positive number in the
  /// type of sums, or a group's gradients are not all reduced.
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
  void gather_now(int g);

  using base::choices_;
  using base::groups_;
  using base::index;
  using base::memory_;
  using base::norm_order_;
  using base::states_;
  using base::tensors_;
  std::unique_ptr<detail::gather_queue> queue_;  // its thread uses all of the base
};

}  // namespace shard
TESSERA_NAMESPACE_END

#include <tessera/shard/detail/fully_sharded.hpp>
#include <tessera/shard/fully_sharded_device.hpp>
