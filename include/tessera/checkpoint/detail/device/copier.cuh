// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Copies between device memory and pageable host memory through two pinned buffers: while one is being filled, the
/// other is emptied.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/checkpoint/detail/box_copy.hpp>
#include <tessera/checkpoint/detail/slabs.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

using tessera::detail::check_cuda;

/// A part of an array in device memory, and the same elements packed in host memory.
struct device_part {
  std::byte* device = nullptr;  // first element of `held`
  box held;
  stride_array strides{};
  box part;
  std::int64_t width = 0;     // bytes of an element
  std::byte* host = nullptr;  // packed
};

/// Pinned buffers, a stream and events, for one direction at a time. Used by one thread at a time.
class device_copier {
 public:
  explicit device_copier(std::int64_t pinned_bytes) : half_(pinned_bytes / 2 / 256 * 256) {
    TESSERA_EXPECTS(pinned_bytes >= 1024,
                    "device_copy_options: pinned_bytes = " << pinned_bytes << ", it must be at least 1024");
    try {
      check_cuda(cudaGetDevice(&device_), "checkpoint: cudaGetDevice");
      check_cuda(
          cudaHostAlloc(reinterpret_cast<void**>(&pinned_), static_cast<std::size_t>(2 * half_), cudaHostAllocDefault),
          "checkpoint: cudaHostAlloc");
      check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "checkpoint: cudaStreamCreateWithFlags");
      for (cudaEvent_t* event : {&begin_, &done_[0], &done_[1]}) {
        check_cuda(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "checkpoint: cudaEventCreateWithFlags");
      }
    } catch (...) {
      free();
      throw;
    }
  }
  device_copier(const device_copier&) = delete;
  device_copier& operator=(const device_copier&) = delete;
  ~device_copier() { free(); }

  /// What is copied afterwards comes after what the stream holds now.
  void follow(device_stream stream) {
    check_cuda(cudaEventRecord(begin_, stream.get()), "checkpoint: cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(stream_, begin_, 0), "checkpoint: cudaStreamWaitEvent");
  }

  /// To the host. On any thread; returns when the elements are there.
  void fetch(const std::vector<device_part>& parts) { run<true>(parts); }
  /// To the device. On any thread; returns when the elements are there.
  void send(const std::vector<device_part>& parts) { run<false>(parts); }

 private:
  struct slab_copy {
    std::byte* host;
    std::int64_t place;  // in the buffer
    std::int64_t bytes;
  };

  void free() noexcept {
    if (stream_ != nullptr) static_cast<void>(cudaStreamSynchronize(stream_));
    for (const cudaEvent_t event : {begin_, done_[0], done_[1]}) {
      if (event != nullptr) static_cast<void>(cudaEventDestroy(event));
    }
    if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
    if (pinned_ != nullptr) static_cast<void>(cudaFreeHost(pinned_));
  }

  template <bool Fetch>
  void run(const std::vector<device_part>& parts) {
    check_cuda(cudaSetDevice(device_), "checkpoint: cudaSetDevice");  // a background thread begins on device 0
    int current = 0;
    const auto finish = [&](int buffer) {  // the copies of a buffer are done, and what follows from that
      if (!busy_[buffer]) return;
      check_cuda(cudaEventSynchronize(done_[buffer]), "checkpoint: cudaEventSynchronize");
      busy_[buffer] = false;
      if constexpr (Fetch) {
        for (const slab_copy& c : copies_[buffer]) {
          std::memcpy(c.host, pinned_ + buffer * half_ + c.place, static_cast<std::size_t>(c.bytes));
        }
      }
      copies_[buffer].clear();
    };
    const auto hand_over = [&] {  // the buffer is full
      check_cuda(cudaEventRecord(done_[current], stream_), "checkpoint: cudaEventRecord");
      busy_[current] = true;
      current = 1 - current;
      finish(current);
    };
    try {
      std::int64_t used = 0;
      for (const device_part& p : parts) {
        const slab_division slabs(p.part, p.width, half_);
        for (std::int64_t k = 0; k < slabs.count(); ++k) {
          const box slab = slabs[k];
          const std::int64_t bytes = slab.volume() * p.width;
          if (used + bytes > half_) {
            hand_over();
            used = 0;
          }
          std::byte* const there = pinned_ + current * half_ + used;
          std::byte* const host = p.host + p.part.local_offset(slab) * p.width;
          if constexpr (Fetch) {
            copies_[current].push_back({host, used, bytes});
          } else {
            std::memcpy(there, host, static_cast<std::size_t>(bytes));
          }
          enqueue<Fetch>(p, slab, there);
          used += (bytes + 15) / 16 * 16;
        }
      }
      hand_over();  // also waits for the other buffer
      hand_over();
    } catch (...) {
      static_cast<void>(cudaStreamSynchronize(stream_));
      for (const int buffer : {0, 1}) {
        busy_[buffer] = false;
        copies_[buffer].clear();
      }
      throw;
    }
  }

  // Between a slab in device memory and its packed elements.
  template <bool Fetch>
  void enqueue(const device_part& p, const box& slab, std::byte* packed) {
    std::byte* const first = p.device + offset_in(p.held, p.strides, slab) * p.width;
    int inner = slab.rank;  // dimensions [inner, rank) are neighbours on the device too
    std::int64_t run = 1;
    while (inner > 0) {
      const auto d = static_cast<std::size_t>(inner - 1);
      if (slab.size[d] > 1 && p.strides[d] != run) break;
      run *= slab.size[d];
      --inner;
    }
    const auto copy = [&](std::byte* device, std::byte* host, std::int64_t pitch, std::int64_t height) {
      const std::int64_t bytes = run * p.width;
      constexpr std::int64_t longest_pitch = 2147483647;
      const bool flat = height == 1 || pitch > longest_pitch || pitch < bytes;
      for (std::int64_t i = 0; flat && i < height; ++i) {
        std::byte* const at = device + i * pitch;
        std::byte* const to = host + i * bytes;
        check_cuda(cudaMemcpyAsync(Fetch ? to : at, Fetch ? at : to, static_cast<std::size_t>(bytes),
                                   Fetch ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, stream_),
                   "checkpoint: cudaMemcpyAsync");
      }
      if (flat) return;
      const auto w = static_cast<std::size_t>(bytes);
      const auto far_pitch = static_cast<std::size_t>(pitch);
      check_cuda(Fetch ? cudaMemcpy2DAsync(host, w, device, far_pitch, w, static_cast<std::size_t>(height),
                                           cudaMemcpyDeviceToHost, stream_)
                       : cudaMemcpy2DAsync(device, far_pitch, host, w, w, static_cast<std::size_t>(height),
                                           cudaMemcpyHostToDevice, stream_),
                 "checkpoint: cudaMemcpy2DAsync");
    };
    if (inner == 0) return copy(first, packed, 0, 1);
    const int rows = inner - 1;  // this dimension moves in one call
    const std::int64_t height = slab.size[rows];
    const std::int64_t pitch = p.strides[static_cast<std::size_t>(rows)] * p.width;
    std::int64_t index[max_box_rank] = {};
    for (std::byte* to = packed;; to += height * run * p.width) {
      std::int64_t offset = 0;
      for (int i = 0; i < rows; ++i) offset += index[i] * p.strides[static_cast<std::size_t>(i)];
      copy(first + offset * p.width, to, pitch, height);
      int i = rows - 1;
      while (i >= 0 && ++index[i] == slab.size[i]) index[i--] = 0;
      if (i < 0) return;
    }
  }

  std::int64_t half_;
  int device_ = 0;
  std::byte* pinned_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t done_[2] = {};
  bool busy_[2] = {};
  std::vector<slab_copy> copies_[2];
};

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
