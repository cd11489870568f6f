// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The members of `comm::nccl`. Needs NCCL (link `tessera::nccl`) and the CUDA runtime, so no other header includes
/// this one. There is no kernel in it: any C++20 compiler takes it.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/detail/nccl/bootstrap.cuh>
#include <tessera/comm/detail/nccl/checks.cuh>
#include <tessera/comm/detail/nccl/state.cuh>
#include <tessera/comm/nccl.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>

TESSERA_NAMESPACE_BEGIN

namespace comm {

inline nccl::nccl(std::shared_ptr<tessera::detail::nccl::rank_state> state)
    : state_(std::move(state)),
      rank_(state_->rank()),
      size_(state_->size()),
      world_rank_(state_->world_rank()),
      device_(state_->device()) {}

inline nccl nccl::wrap(ncclComm* engine, nccl_options options) {
  TESSERA_EXPECTS(engine != nullptr, "comm::nccl::wrap: the communicator is null");
  const std::string problem = detail::nccl::version_problem();
  TESSERA_EXPECTS_AS(nccl_error, problem.empty(), "comm::nccl::wrap: " << problem);
  auto state = std::make_shared<detail::nccl::rank_state>(options, nullptr, 0);
  state->adopt(engine, false);
  state->learn("wrap", true);
  return nccl(std::move(state));
}

inline nccl nccl::create(int rank, int size, const all_gather_function& all_gather, nccl_options options) {
  return nccl(detail::nccl::create(rank, size, all_gather, options));
}

inline std::vector<nccl> nccl::create_all(std::span<const int> devices, nccl_options options) {
  std::vector<nccl> ranks;
  for (auto& state : detail::nccl::create_all(devices, options)) ranks.push_back(nccl(std::move(state)));
  return ranks;
}

inline ncclComm* nccl::native() const noexcept { return state_->native(); }
inline std::chrono::milliseconds nccl::timeout() const noexcept { return state_->options().timeout; }
inline std::span<std::int32_t> nccl::host_words() const noexcept { return state_->host_words(); }
inline bool nccl::failed() const { return state_->failed(); }
inline void nccl::check() { state_->check(); }
inline void nccl::wait(device_stream stream) { state_->wait(stream, timeout()); }
inline void nccl::wait(device_stream stream, std::chrono::milliseconds timeout) { state_->wait(stream, timeout); }

inline void nccl::fail(const std::string& reason) {
  state_->fail("rank " + std::to_string(world_rank_) + " failed: " + reason);
}

inline void nccl::call(const char* phase, const char* function, const std::function<int(ncclComm*)>& f) {
  state_->call(phase, function, f);
}

inline nccl nccl::split(int color, int key) {
  const detail::nccl::device_guard guard(device_);
  auto state = std::make_shared<detail::nccl::rank_state>(state_->options(), state_->family(), world_rank_);
  const std::int32_t least = state_->least(color, "split");
  TESSERA_EXPECTS(least >= 0, "split: a rank gives color = " << least << ", it must not be negative");
  state->adopt(state_->split(color, key), true);
  state->learn("split", false);
  return nccl(std::move(state));
}

inline void nccl::barrier(device_stream stream) {
  state_->enqueue("barrier", "ncclAllReduce", [&](ncclComm_t comm) {
    return ncclAllReduce(state_->token(), state_->token(), 1, ncclInt32, ncclSum, comm, stream.get());
  });
}

template <transferable T>
void nccl::broadcast(device_stream stream, T* data, std::int64_t count, int root) {
  detail::nccl::expect_rank(*this, root, "broadcast", "root");
  const std::size_t bytes = detail::nccl::expect_elements(*this, "broadcast", "data", data, count);
  state_->enqueue("broadcast", "ncclBroadcast", [&](ncclComm_t comm) {
    if (bytes == 0) return ncclSuccess;
    return ncclBroadcast(data, data, bytes, ncclInt8, root, comm, stream.get());
  });
}

template <reducible T>
void nccl::all_reduce(device_stream stream, const T* send, T* recv, std::int64_t count, reduce_op op) {
  const auto bytes = static_cast<std::int64_t>(detail::nccl::expect_elements(*this, "all_reduce", "send", send, count));
  detail::nccl::expect_elements(*this, "all_reduce", "recv", recv, count);
  if (send != recv) expect_disjoint(send, bytes, "send", recv, bytes, "recv");
  state_->enqueue("all_reduce", "ncclAllReduce", [&](ncclComm_t comm) {
    if (count == 0) return ncclSuccess;
    return ncclAllReduce(send, recv, static_cast<std::size_t>(count), detail::nccl::type_of<T>(),
                         detail::nccl::op_of(op), comm, stream.get());
  });
}

template <transferable T>
void nccl::all_gather(device_stream stream, const T* send, T* recv, std::int64_t count) {
  const std::size_t bytes = detail::nccl::expect_elements(*this, "all_gather", "send", send, count, size_);
  detail::nccl::expect_elements(*this, "all_gather", "recv", recv, count, size_);
  if (bytes > 0 && send != recv + rank_ * count) {
    expect_disjoint(send, static_cast<std::int64_t>(bytes), "send", recv, static_cast<std::int64_t>(bytes) * size_,
                    "recv");
  }
  state_->enqueue("all_gather", "ncclAllGather", [&](ncclComm_t comm) {
    if (bytes == 0) return ncclSuccess;
    return ncclAllGather(send, recv, bytes, ncclInt8, comm, stream.get());
  });
}

template <reducible T>
void nccl::reduce_scatter(device_stream stream, const T* send, T* recv, std::int64_t count, reduce_op op) {
  const auto bytes =
      static_cast<std::int64_t>(detail::nccl::expect_elements(*this, "reduce_scatter", "send", send, count, size_));
  detail::nccl::expect_elements(*this, "reduce_scatter", "recv", recv, count, size_);
  if (bytes > 0 && recv != send + rank_ * count) expect_disjoint(send, bytes * size_, "send", recv, bytes, "recv");
  state_->enqueue("reduce_scatter", "ncclReduceScatter", [&](ncclComm_t comm) {
    if (count == 0) return ncclSuccess;
    return ncclReduceScatter(send, recv, static_cast<std::size_t>(count), detail::nccl::type_of<T>(),
                             detail::nccl::op_of(op), comm, stream.get());
  });
}

template <transferable T>
void nccl::all_to_all_v(device_stream stream, const T* send, const std::int64_t* send_counts,
                        const std::int64_t* send_offsets, T* recv, const std::int64_t* recv_counts,
                        const std::int64_t* recv_offsets) {
  TESSERA_EXPECTS(
      send_counts != nullptr && send_offsets != nullptr && recv_counts != nullptr && recv_offsets != nullptr,
      "all_to_all_v: an array of counts or offsets is null, all of them have " << size_ << " elements");
  for (int peer = 0; peer < size_; ++peer) {
    detail::nccl::expect_elements(*this, "all_to_all_v", "send", send, send_counts[peer]);
    detail::nccl::expect_elements(*this, "all_to_all_v", "recv", recv, recv_counts[peer]);
    TESSERA_EXPECTS(send_offsets[peer] >= 0 && recv_offsets[peer] >= 0,
                    "all_to_all_v: offsets for rank " << peer << " are " << send_offsets[peer] << " (send) and "
                                                      << recv_offsets[peer] << " (recv), they must not be negative");
  }
  TESSERA_EXPECTS(send_counts[rank_] == recv_counts[rank_], "all_to_all_v: rank "
                                                                << rank_ << " would send itself " << send_counts[rank_]
                                                                << " elements and receive " << recv_counts[rank_]);
  const auto bytes = [](std::int64_t count) { return static_cast<std::size_t>(count) * sizeof(T); };
  state_->enqueue("all_to_all_v", "ncclSend and ncclRecv", [&](ncclComm_t comm) {
    detail::nccl::message_group group;
    for (int shift = 1; shift < size_; ++shift) {
      const int to = (rank_ + shift) % size_;
      const int from = (rank_ - shift + size_) % size_;
      group.send(send + send_offsets[to], bytes(send_counts[to]), to, comm, stream);
      group.receive(recv + recv_offsets[from], bytes(recv_counts[from]), from, comm, stream);
    }
    return group.end();
  });
  detail::nccl::copy_to_self(stream, send + send_offsets[rank_], recv + recv_offsets[rank_], bytes(send_counts[rank_]));
}

inline void nccl::exchange(device_stream stream, std::span<const transfer> sends, std::span<const transfer> receives,
                           const char* phase) {
  detail::nccl::expect_transfers(*this, sends, phase, "sends");
  detail::nccl::expect_transfers(*this, receives, phase, "receives");
  detail::nccl::expect_own_transfers(rank_, sends, receives, phase);
  state_->enqueue(phase, "ncclSend and ncclRecv", [&](ncclComm_t comm) {
    detail::nccl::message_group group;
    for (const transfer& t : sends) {
      if (t.peer != rank_) group.send(t.data, static_cast<std::size_t>(t.bytes), t.peer, comm, stream);
    }
    for (const transfer& t : receives) {
      if (t.peer != rank_) group.receive(t.data, static_cast<std::size_t>(t.bytes), t.peer, comm, stream);
    }
    return group.end();
  });
  detail::nccl::pair_own_transfers(rank_, sends, receives, [&](const transfer* from, const transfer* to) {
    detail::nccl::copy_to_self(stream, from->data, to->data, static_cast<std::size_t>(from->bytes));
  });
}

}  // namespace comm

TESSERA_NAMESPACE_END
