// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// `fully_sharded` in device memory: the type, for any compiler. Its members are defined in `fully_sharded.cuh`.

#include <cstdint>
#include <span>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/fully_sharded.hpp>

struct CUevent_st;  // what cudaEvent_t points to: named here so that no CUDA header is needed

TESSERA_NAMESPACE_BEGIN
namespace shard {

/// Sharded training state in device memory, over a communicator such as `comm::nccl`.
///
///     shard::fully_sharded<precision::bf16, float, reduction::native, comm::nccl> model(groups, {}, state, step);
///     model.forward(stream, [&](int g) { ... enqueue on stream, with model.full(g, i) ... });
///     model.backward(stream, [&](int g) { ... model.full_gradient(g, i) ... });
///     model.divide_gradients(stream, global_tokens);
///     model.gradient_norm(stream, 1.0);         // norm and factor stay on the device
///     model.step(stream, adamw, ++t, rate);     // skipped on all ranks if a gradient is not finite
///
/// The calls mean what they mean in host memory; they enqueue and return, on the stream they are given, which is the
/// same for all calls of a step. After construction nothing allocates, waits for the device or reads its memory on the
/// host (but `set` and `wait_for_norm`, which say so), so a step may be captured in a graph as far as the communicator
/// can: begin the capture when nothing is under way, and end it after `step`.
///
/// - **Gather**: with `group::gather`, gathers run on a stream of the object: after what the caller's stream held at
///   `begin_gather`, beside what it gets until `end_gather`. `forward` and `backward` gather `prefetch` groups ahead,
///   so an all-gather has the time in which the group before is computed.
/// - **Reduce**: with `group::gather`, whole gradients are packed on the caller's stream (their memory is free at once
///   for the next group) and travel on another stream of the object, beside the backward of the next group; `ranks` and
///   `replicas` are used there. `divide_gradients`, `gradient_norm` and `step` come after. Before reading
///   `local(g, i).gradient` on the caller's stream, call `join`.
/// - **Clipping**: `gradient_norm` leaves the norm and the factor on the device, over mixed meshes as the host half
///   does, with the same bits; `step` uses the factor. Where a gradient is not finite the norm is not a number, and the
///   step changes nothing, on all ranks alike.
/// - **Bits**: gathers, `reduction::ordered`, divisions and the norm have the bits of the host half; AdamW rounds as
/// its
///   kernel does (`adamw.cuh`).
///
/// Streams, events and memory belong to the device that was current at construction, which must be current in all
/// calls. The object is used by one thread at a time. Destroying it does not wait.
/// @tparam Precision,Moment,Reduction As in host memory. @tparam Comm Communicator of device memory.
template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
class fully_sharded<Precision, Moment, Reduction, Comm> : public sharded_groups<Precision, Moment, Reduction, Comm> {
  static_assert(device_reduction_policy<Reduction, Comm>,
                "tessera::shard::fully_sharded needs a reduction for device memory: keeps_chunks, rows, "
                "workspace_bytes, scatter and join with the chunks of all ranks. Models: reduction::native, "
                "reduction::ordered.");
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

  /// Lays everything out and writes the tables that kernels read; parameters and moments keep what is in `state`. Not
  /// collective; waits for the copies of the tables.
  /// @param groups  What is sharded, in the order of forward. @param choices Prefetch and accumulation.
  /// @param state   At least `memory_of<..., space::device>(...).state()` bytes of device memory. Zero-filled memory is
  ///                a right start for moments. The tables in it belong to this object: a checkpoint is `state_arrays`.
  /// @param step    At least `memory_of<..., space::device>(...).step()` bytes of device memory.
  /// @throws invalid_argument if groups, choices or sizes are wrong, cuda_error if the runtime fails.
  fully_sharded(std::vector<group<Comm>> groups, const options& choices, state_memory state, step_memory step);
  /// Work that was enqueued goes on to its end.
  ~fully_sharded();

  /// Sets this rank's part of a parameter (master and storage) from the whole one, which every rank has or computes.
  /// Set-up code: allocates, and waits for the stream. @param stream Where. @param g Group. @param i Parameter.
  /// @param whole The tensor that is divided, packed, in host memory.
  /// @throws invalid_argument if the size is wrong, or the group is gathered and does not stay so.
  void set(device_stream stream, int g, int i, std::span<const accumulate> whole);

  /// Sets masters to the parameters, after a load of parameters alone. @param stream Where.
  void masters_from_parameters(device_stream stream);

  /// Starts gathering group `g`. Nothing happens where it is gathered or under way. Collective over the group's
  /// `gather`, or `ranks` where it has none. @param stream Where. @param g Group.
  /// @throws invalid_argument naming the group whose memory it would take, when more than `prefetch + 1` are in use.
  void begin_gather(device_stream stream, int g);
  /// What the stream gets afterwards sees whole parameters. @param stream Where. @param g Group, after `begin_gather`.
  void end_gather(device_stream stream, int g);
  /// Gives the memory of a gathered group back, when the stream gets there. @param stream Where. @param g Group.
  void release(device_stream stream, int g);

  /// Sums the whole gradients of group `g` into the ranks' parts, or, without gradient synchronisation, keeps them.
  /// Collective over the group's `ranks` and `replicas`. @param stream Where. @param g Group.
  /// @throws invalid_argument if nobody wrote gradients, what the communicator throws; after that, `abandon_step`.
  void reduce(device_stream stream, int g);
  /// What the stream gets afterwards comes after all reductions. @param stream Where.
  void join(device_stream stream);

  /// Calls `use(g)` for each group in order, gathered, with `prefetch` further groups on the way; gives groups back.
  /// @param stream Where `use` enqueues. @param use Enqueues the work of a group.
  template <class F>
  void forward(device_stream stream, F&& use);
  /// The same in reverse order, and `reduce(stream, g)` after `use(g)`.
  /// @param stream Where `use` enqueues. @param use Enqueues the work of a group.
  template <class F>
  void backward(device_stream stream, F&& use);

  /// Divides the summed gradients of all groups. Not collective. @param stream Where. @param divisor The number of
  /// tokens of the global batch, where losses are sums over tokens. @throws invalid_argument if it is not a normal
  /// positive number in the type of sums, or a group's gradients are not all reduced.
  void divide_gradients(device_stream stream, double divisor);

  /// The 2-norm of all gradients, as in host memory, and the factor `clip_factor(norm, max_norm)` for the next `step`.
  /// Collective over the groups' `ranks` and `distinct`, and `stages`.
  /// @param stream   Where. @param max_norm The bound of the norm; 0 or less: no clipping.
  /// @param stages   Ranks of the other pipeline stages, which have groups of their own; null: there are none.
  /// @return the norm, in device memory; not a number if a gradient is not finite.
  const double* gradient_norm(device_stream stream, double max_norm = 0.0, Comm* stages = nullptr);
  /// Waits for the stream and gives the norm of the last `gradient_norm`. @param stream Where that was enqueued.
  /// @throws error naming the groups if a gradient was not finite; what the communicator's `wait` throws.
  double wait_for_norm(device_stream stream);

  /// AdamW on this rank's parts, one launch; writes the storage type from the masters; the gradients are used up,
  /// gathered parameters are stale and given back. The factor is that of `gradient_norm` since the last step, else 1.
  /// Not collective. @param stream Where. @param choices Coefficients. @param t Number of the step, from 1.
  /// @param rate Learning rate. @throws invalid_argument as in host memory; nothing is changed then.
  void step(device_stream stream, const adamw_options& choices, std::int64_t t, double rate);
  /// The same with number and rate from `control`, for captured graphs. @param stream Where. @param choices
  /// Coefficients.
  void step(device_stream stream, const adamw_options& choices);
  /// Number of the last step, rate and factor, in device memory.
  adamw_control* control() const { return memory_.tables.control; }

  /// Forgets the gradients of this step and gives back all gathered parameters, after a failure or to skip a step.
  /// State and step number stay. Not collective. @param stream What it gets afterwards comes after what is under way.
  void abandon_step(device_stream stream);

 private:
  void make_streams();
  void free_streams() noexcept;
  void write_tables();
  void fork(device_stream from, CUstream_st* to);
  void gather_now(device_stream stream, int g);
  void update(device_stream stream, const adamw_options& choices);

  using base::choices_;
  using base::groups_;
  using base::index;
  using base::memory_;
  using base::norm_order_;
  using base::states_;
  using base::tensors_;
  std::vector<std::vector<std::int64_t>> chunks_;  // of each group: chunks of the ranks of this replica
  std::vector<std::vector<std::int64_t>> rows_;    // of each group: rows of each replica
  CUstream_st* gather_stream_ = nullptr;           // null: nothing runs in the background
  CUstream_st* reduce_stream_ = nullptr;
  CUevent_st* forked_ = nullptr;
  CUevent_st* reduced_ = nullptr;
  std::vector<CUevent_st*> gathered_;  // of each group
  bool reducing_ = false;              // the caller's stream does not wait for `reduced_` yet
  bool scaled_ = false;                // there is a factor for this step
  std::int64_t num_tiles_ = 0;
};

}  // namespace shard
TESSERA_NAMESPACE_END
