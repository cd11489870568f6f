// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One GPU a rank, device memory over NCCL: the type, for any compiler. Its members are defined in `nccl.cuh`, which
/// needs NCCL; a program that uses them includes it and links `tessera::nccl`.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

struct ncclComm;  // what ncclComm_t points to: named here so that NCCL's header is not needed

TESSERA_NAMESPACE_BEGIN

namespace detail::nccl {
class rank_state;
}

namespace comm {

/// Options of `comm::nccl`.
struct nccl_options {
  /// How long a call may take on the host, and `wait` for a stream; at least 1 ms. The first call of each kind connects
  /// GPUs, which may take seconds.
  std::chrono::milliseconds timeout{30000};
  /// How long creation and `split` may take; at least 1 ms.
  std::chrono::milliseconds creation_timeout{120000};
  /// SMs that a collective takes at least and at most, one block each; 0 leaves it to NCCL. Not for `wrap`.
  int min_ctas = 0;
  int max_ctas = 0;  ///< See `min_ctas`.
  /// For `wrap`: whether a failure aborts the engine's communicator, which frees it. Without, its kernels go on waiting
  /// until the engine aborts it itself.
  bool abort_wrapped = false;
};

/// One rank of an NCCL communicator, with the GPU that was current when it was made.
///
/// Collectives enqueue on the stream they are given and return; results are there when the stream gets there. They
/// can be captured in CUDA graphs as far as NCCL can (call each kind once before: first calls connect GPUs; destroy the
/// graphs before the communicator). Counts of `all_to_all_v` and `exchange` are read on the host. Operations of one
/// communicator are called in the same order by all ranks, and run in that order. Sums are deterministic for a given
/// number of ranks, but taken in NCCL's order: for one that does not depend on the ranks see `ordered_reduce.cuh`.
///
/// **No call waits forever.** Communicators made here are non-blocking: NCCL works in a thread of its own, and this
/// class polls it, at most for the timeout. A collective that another rank never calls is found by `wait`, which polls
/// the stream the same way: use it where the host must wait. In both cases the communicator is aborted, which ends its
/// kernels, and `comm_error` names the operation; NCCL does not tell which rank is at fault, so `peer()` is -1. Other
/// ranks are not told: their own timeout does. An engine's communicator that is blocking may block in a call.
///
/// A failure is final on this rank for the communicator, for those split from it and for the one it was split from:
/// all calls throw `comm_error` with the first cause. Go on with a new `comm::nccl`. Buffers of operations that failed
/// may be freed once their stream has been synchronised. Ranks in errors are ranks of the first communicator, not of a
/// sub-communicator.
///
/// The last handle finalises the communicator: it waits, at most for the timeout, until the operations of this rank
/// are done, and aborts it then; destroy it when all ranks are done with it. NCCL frees the communicators of all GPUs
/// of a process when the last of them goes; a pause of a quarter of a second keeps that apart from what its threads
/// free. A handle, its copies and its sub-communicators are used by one thread at a time; a communicator that was split
/// off may be used by another thread than its origin.
class nccl {
 public:
  using space = tessera::space::device;  ///< Buffers are device memory.

  /// An all-gather of bytes over the ranks, in host memory: `send [bytes]`, `recv [size, bytes]`.
  using all_gather_function = std::function<void(const void* send, void* recv, std::size_t bytes)>;

  /// Uses the engine's communicator, which stays its own and outlives this one.
  /// @param engine  An `ncclComm_t`, blocking or not. @param options Timeout, and who may abort.
  /// @throws invalid_argument for null or wrong options, nccl_error if NCCL is older than its header or refuses.
  static nccl wrap(ncclComm* engine, nccl_options options = {});

  /// Collective: makes a communicator with the current GPU of each rank. Host: returns when it is ready.
  /// @param rank,size  This rank and their number. @param all_gather Called once. @param options Timeout and SMs.
  /// @throws invalid_argument for wrong values or when two ranks have the same GPU; nccl_error on all ranks if one
  /// cannot take part, for example because its NCCL is older than its header; comm_error after the creation timeout.
  static nccl create(int rank, int size, const all_gather_function& all_gather, nccl_options options = {});

  /// The same, over a communicator of host memory (`comm::mpi` between processes, `comm::threads` between threads).
  /// @param bootstrap Same ranks, same size; used during the call alone. @param options Timeout and SMs.
  template <host_communicator Bootstrap>
  static nccl create(Bootstrap& bootstrap, nccl_options options = {}) {
    const auto gather = [&](const void* send, void* recv, std::size_t bytes) {
      bootstrap.all_gather({}, static_cast<const std::byte*>(send), static_cast<std::byte*>(recv),
                           static_cast<std::int64_t>(bytes));
    };
    return create(bootstrap.rank(), bootstrap.size(), gather, options);
  }

  /// Several GPUs of this process at once, one rank each, in the order given; each is used by a thread of its own
  /// afterwards. Host: returns when they are ready. @param devices CUDA device numbers, different ones.
  /// @param options Timeout and SMs. @throws as `create`.
  static std::vector<nccl> create_all(std::span<const int> devices, nccl_options options = {});

  /// This rank, in `[0, size())`.
  int rank() const noexcept { return rank_; }
  /// Number of ranks.
  int size() const noexcept { return size_; }
  /// This rank in the communicator that was made or wrapped: the number that errors use.
  int world_rank() const noexcept { return world_rank_; }
  /// CUDA device of this rank.
  int device() const noexcept { return device_; }
  /// The `ncclComm_t`, null once it was aborted.
  ncclComm* native() const noexcept;
  /// How long a call may take.
  std::chrono::milliseconds timeout() const noexcept;
  /// Pinned host memory, shared by all handles of this communicator: where an operation that must read counts on the
  /// host lets the device write them. 16 KiB, zeros at first, theirs until the next such operation.
  std::span<std::int32_t> host_words() const noexcept;

  /// Collective: the ranks of equal color form a communicator, ordered by key, then by rank. Host: returns when it is
  /// ready. @param color Not negative. @param key Any. @throws invalid_argument on all ranks if the color of any is
  /// negative, comm_error if a rank does not come.
  nccl split(int color, int key);

  /// What is enqueued after it runs when all ranks have come: the stream waits, not the host. @param stream Where.
  void barrier(device_stream stream);

  /// Gives everyone the elements of `root`. @param stream Where. @param data `[count]`, read on the root and written
  /// elsewhere. @param count Elements, the same on all ranks. @param root Rank that has them.
  template <transferable T>
  void broadcast(device_stream stream, T* data, std::int64_t count, int root);

  /// Joins the elements of all ranks; everyone gets all results. @param stream Where. @param send `[count]`.
  /// @param recv `[count]`, equal to `send` or disjoint from it. @param count Elements, the same on all ranks.
  /// @param op How contributions are joined, in NCCL's order.
  template <reducible T>
  void all_reduce(device_stream stream, const T* send, T* recv, std::int64_t count, reduce_op op = reduce_op::sum);

  /// Gives everyone the elements of everyone. @param stream Where. @param send `[count]`; may be this rank's place in
  /// `recv`. @param recv `[size, count]`, in rank order. @param count Elements per rank, the same on all ranks.
  template <transferable T>
  void all_gather(device_stream stream, const T* send, T* recv, std::int64_t count);

  /// Joins the elements of all ranks; each rank gets its part. @param stream Where. @param send `[size, count]`: row
  /// `r` is this rank's contribution to the part of rank `r`. @param recv `[count]`, disjoint from `send` or this
  /// rank's row of it. @param count Elements per part, the same on all ranks. @param op How contributions are joined.
  template <reducible T>
  void reduce_scatter(device_stream stream, const T* send, T* recv, std::int64_t count, reduce_op op = reduce_op::sum);

  /// Sends each rank a part of its own, as grouped sends and receives. Host arrays `[size]`, in elements, read before
  /// it returns; `send_counts[r]` here equals `recv_counts[rank]` on rank `r`. Buffers do not overlap.
  /// @param stream Where. @param send Elements to send. @param send_counts How many go to each rank.
  /// @param send_offsets Where each rank's part starts in `send`. @param recv Where elements arrive.
  /// @param recv_counts How many come from each rank. @param recv_offsets Where each rank's part goes in `recv`.
  template <transferable T>
  void all_to_all_v(device_stream stream, const T* send, const std::int64_t* send_counts,
                    const std::int64_t* send_offsets, T* recv, const std::int64_t* recv_counts,
                    const std::int64_t* recv_offsets);

  /// Sends and receives messages as one group: none of them waits for another of the same group. Only the ranks named
  /// take part. The k-th message from one rank to another meets the k-th receive there, over all exchanges. Messages of
  /// 0 bytes do not happen, on either side. Messages to oneself are copies. @param stream Where. @param sends Messages
  /// to send. @param receives Messages to receive; they do not overlap. @param phase How errors call the operation, a
  /// literal.
  void exchange(device_stream stream, std::span<const transfer> sends, std::span<const transfer> receives,
                const char* phase = "exchange");

  /// Waits on the host until the stream is done, at most for the timeout: where an engine would synchronise the stream.
  /// @param stream Not being captured. @throws comm_error after the timeout or a failure of this communicator, which
  /// is aborted then; the timeout covers all work of the stream. nccl_error for an error of NCCL, cuda_error for one of
  /// CUDA.
  void wait(device_stream stream);
  /// The same with a timeout of its own. @param stream Not being captured. @param timeout At least 1 ms.
  void wait(device_stream stream, std::chrono::milliseconds timeout);

  /// Calls a function of NCCL that this class does not have, and waits on the host until NCCL is done with it, at most
  /// for the creation timeout. @param phase How errors call the operation, a literal. @param function Its name, for
  /// errors. @param f Calls it with the `ncclComm_t` and returns its `ncclResult_t`. @throws as other calls.
  void call(const char* phase, const char* function, const std::function<int(ncclComm*)>& f);

  /// Throws if the communicator has failed or NCCL has found an error in the background; does not wait.
  /// @throws comm_error, nccl_error.
  void check();

  /// Aborts this rank's communicator: operations under way end with unspecified results, later calls throw. Other ranks
  /// find out by their timeout. Does not throw. @param reason For the message.
  void fail(const std::string& reason);

  /// Whether calls throw because of a failure that is known here.
  bool failed() const;

 private:
  explicit nccl(std::shared_ptr<tessera::detail::nccl::rank_state> state);

  std::shared_ptr<tessera::detail::nccl::rank_state> state_;
  int rank_ = 0;
  int size_ = 1;
  int world_rank_ = 0;
  int device_ = 0;
};

static_assert(device_communicator<nccl>);

}  // namespace comm

TESSERA_NAMESPACE_END
