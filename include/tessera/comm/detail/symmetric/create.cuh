// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/detail/nccl/state.cuh>
#include <tessera/comm/detail/symmetric/state.cuh>
#include <tessera/comm/nccl.cuh>
#include <tessera/comm/symmetric.hpp>
#include <tessera/core/error.hpp>

// How the ranks make their windows. A rank that threw alone would leave the others waiting, so every step ends with
// all ranks telling what they found, and all going the same way.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

/// Words for other ranks, zero-terminated; empty when there are none.
using note = std::array<char, 400>;

inline note to_note(const std::string& text) {
  note words{};
  text.copy(words.data(), words.size() - 1);
  return words;
}

/// What each rank tells the others before anything is made.
struct rank_card {
  std::uint64_t window_bytes;
  std::int32_t slots;
  std::int32_t require_direct;
  std::int32_t world_rank;
  note problem;   ///< With its options.
  note obstacle;  ///< Why others cannot reach its memory.
};

/// The values of all ranks, on the host. Waits.
template <class T>
std::vector<T> gather(comm::nccl& over, const T& own) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct scratch {
    cudaStream_t stream = nullptr;
    std::byte* data = nullptr;
    explicit scratch(std::size_t bytes) {
      check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
      check_cuda(cudaMalloc(reinterpret_cast<void**>(&data), bytes), "cudaMalloc");
    }
    scratch(const scratch&) = delete;
    scratch& operator=(const scratch&) = delete;
    ~scratch() {
      static_cast<void>(cudaFree(data));
      static_cast<void>(cudaStreamDestroy(stream));
    }
  };
  const auto size = static_cast<std::size_t>(over.size());
  const scratch s((size + 1) * sizeof(T));
  std::vector<T> all(size);
  check_cuda(cudaMemcpyAsync(s.data, &own, sizeof(T), cudaMemcpyHostToDevice, s.stream), "cudaMemcpyAsync");
  over.all_gather(s.stream, static_cast<const std::byte*>(s.data), s.data + sizeof(T),
                  static_cast<std::int64_t>(sizeof(T)));
  over.wait(s.stream);  // before a copy to pageable memory, which would wait without end
  check_cuda(cudaMemcpyAsync(all.data(), s.data + sizeof(T), size * sizeof(T), cudaMemcpyDeviceToHost, s.stream),
             "cudaMemcpyAsync");
  over.wait(s.stream);
  return all;
}

/// The first note of any rank, with its rank in front; empty if there is none. The same on all ranks. Waits.
inline std::string first_note(comm::nccl& over, const std::string& own) {
  const std::vector<note> notes = gather(over, to_note(own));
  for (std::size_t r = 0; r < notes.size(); ++r) {
    if (notes[r][0] != '\0') return "rank " + std::to_string(r) + ": " + notes[r].data();
  }
  return {};
}

/// What is wrong with the options; empty if nothing is.
inline std::string problem_of(const comm::symmetric_options& options) {
  constexpr std::size_t most_bytes = std::size_t{1} << 46;
  std::ostringstream text;
  if (options.window_bytes < 1 || options.window_bytes > most_bytes) {
    text << "window_bytes = " << options.window_bytes << ", it must be 1 to " << most_bytes;
  } else if (options.slots < 1 || options.slots > comm::max_symmetric_slots) {
    text << "slots = " << options.slots << ", it must be 1 to " << comm::max_symmetric_slots;
  } else if (options.timeout.count() < 1) {
    text << "the timeout is " << options.timeout.count() << " ms, it must be at least 1 ms";
  } else if (options.num_sms < 0) {
    text << "num_sms = " << options.num_sms << ", it must be at least 1, or 0 for the library's choice";
  } else if (options.copy_streams < 0 || options.copy_streams > 8) {
    text << "copy_streams = " << options.copy_streams << ", it must be 0 to 8";
  }
  return text.str();
}

/// Why this rank cannot share its memory, as far as that is known before it is tried; empty if it can.
inline std::string obstacle_of(const comm::nccl& over, const comm::symmetric_options& options) {
  if (!options.allow_direct) return "its options do not allow it";
  if (over.size() > comm::max_symmetric_ranks) {
    return "there are " + std::to_string(over.size()) + " ranks, at most " + std::to_string(comm::max_symmetric_ranks) +
           " share memory";
  }
  int major = 0;
  const cudaError_t asked = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, over.device());
  if (asked != cudaSuccess) return std::string("cudaDeviceGetAttribute: ") + cudaGetErrorString(asked);
  if (major < 9) return "its device has compute capability " + std::to_string(major) + ".x, 9.0 is needed";
  return {};
}

/// Throws the same on all ranks where the cards do not fit together.
inline void expect_cards(const std::vector<rank_card>& cards) {
  for (std::size_t r = 0; r < cards.size(); ++r) {
    TESSERA_EXPECTS(cards[r].problem[0] == '\0', "comm::symmetric: rank " << r << ": " << cards[r].problem.data());
    TESSERA_EXPECTS(cards[r].window_bytes == cards[0].window_bytes && cards[r].slots == cards[0].slots,
                    "comm::symmetric: rank 0 asks for window_bytes = "
                        << cards[0].window_bytes << " and slots = " << cards[0].slots << ", rank " << r << " for "
                        << cards[r].window_bytes << " and " << cards[r].slots
                        << "; they must be the same on all ranks");
    TESSERA_EXPECTS(cards[r].require_direct == cards[0].require_direct,
                    "comm::symmetric: require_direct differs between rank 0 and rank " << r);
  }
}

/// What `step` throws, in words; empty if nothing.
template <class F>
std::string words_of(F&& step) {
  try {
    step();
  } catch (const std::exception& e) {
    return e.what();
  }
  return {};
}

/// `comm::symmetric::create`.
inline std::shared_ptr<shared_window> create(comm::nccl& over, const comm::symmetric_options& options) {
  const device_guard guard(over.device());
  rank_card own{};
  own.window_bytes = options.window_bytes;
  own.slots = options.slots;
  own.require_direct = options.require_direct ? 1 : 0;
  own.world_rank = over.world_rank();
  own.problem = to_note(problem_of(options));
  own.obstacle = to_note(obstacle_of(over, options));
  const std::vector<rank_card> cards = gather(over, own);
  expect_cards(cards);
  std::string reason;
  std::vector<int> world_ranks;
  for (std::size_t r = 0; r < cards.size(); ++r) {
    if (reason.empty() && cards[r].obstacle[0] != '\0') {
      reason = "rank " + std::to_string(r) + ": " + cards[r].obstacle.data();
    }
    world_ranks.push_back(cards[r].world_rank);
  }
  const auto expect_direct = [&] {
    TESSERA_EXPECTS_AS(nccl_error, reason.empty() || !options.require_direct, "comm::symmetric: " << reason);
  };
  expect_direct();

  auto window = std::make_shared<shared_window>(over, options, std::move(world_ranks));
  const bool maps = reason.empty() && over.size() > 1;  // one rank has nobody to share with
  const std::string failed = first_note(over, words_of([&] { window->allocate_all(maps); }));
  TESSERA_EXPECTS_AS(cuda_error, failed.empty(), "comm::symmetric: " << failed);
  if (maps) {
    reason = first_note(over, window->map_peers(over));
    if (reason.empty()) reason = first_note(over, words_of([&] { window->learn_addresses(); }));
    if (reason.empty()) {
      // Words that reach everyone say more than what anybody promises.
      const std::string met = words_of([&] {
        if (const int missing = window->meet(); missing >= 0) {
          throw error("what rank " + std::to_string(missing) + " writes to its memory does not arrive");
        }
      });
      reason = first_note(over, met);
    }
    expect_direct();
  }
  window->settle(std::move(reason));
  return window;
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
