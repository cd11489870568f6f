// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// How NCCL communicators come to be: over an all-gather of the engine, or for several GPUs of one process.

#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/detail/nccl/state.cuh>
#include <tessera/comm/nccl.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail::nccl {

/// What each rank tells the others before NCCL begins. A rank that cannot go on says so here: one that threw before
/// would leave the others waiting.
struct rank_card {
  ncclUniqueId id;                ///< Of rank 0.
  std::array<char, 16> gpu;       ///< Its UUID.
  std::int32_t version;           ///< Of the NCCL that is loaded.
  std::array<char, 300> problem;  ///< Zero-terminated; empty when there is none.
};
static_assert(std::is_trivially_copyable_v<rank_card>);

/// This rank's card.
inline rank_card own_card(int rank) {
  rank_card card{};
  std::string problem = version_problem();
  int device = 0;
  cudaDeviceProp properties{};
  if (cudaError_t result = cudaGetDevice(&device); problem.empty()) {
    if (result == cudaSuccess) result = cudaGetDeviceProperties(&properties, device);
    if (result != cudaSuccess) problem = std::string("it has no GPU: ") + cudaGetErrorString(result);
  }
  if (problem.empty()) {
    static_assert(sizeof(properties.uuid) == sizeof(card.gpu));
    std::memcpy(card.gpu.data(), &properties.uuid, sizeof(card.gpu));
    int version = 0;
    if (ncclGetVersion(&version) == ncclSuccess) card.version = version;
  }
  if (problem.empty() && rank == 0) {
    if (const ncclResult_t result = ncclGetUniqueId(&card.id); result != ncclSuccess) {
      problem = "ncclGetUniqueId: " + text_of(result, nullptr);
    }
  }
  problem.copy(card.problem.data(), card.problem.size() - 1);
  return card;
}

/// Throws the same on all ranks where the cards do not fit together. @param cards Of all ranks.
inline void expect_cards(std::span<const rank_card> cards) {
  for (std::size_t rank = 0; rank < cards.size(); ++rank) {
    const rank_card& card = cards[rank];
    TESSERA_EXPECTS_AS(nccl_error, card.problem[0] == '\0',
                       "comm::nccl::create: rank " << rank << " cannot take part: " << card.problem.data());
    TESSERA_EXPECTS_AS(nccl_error, card.version == cards[0].version,
                       "comm::nccl::create: rank 0 has NCCL " << version_text(cards[0].version) << " and rank " << rank
                                                              << " has NCCL " << version_text(card.version)
                                                              << ", all ranks need the same version");
    for (std::size_t other = 0; other < rank; ++other) {
      TESSERA_EXPECTS(cards[other].gpu != card.gpu, "comm::nccl::create: ranks "
                                                        << other << " and " << rank
                                                        << " have the same GPU; call cudaSetDevice with one of its own "
                                                           "on each rank before");
    }
  }
}

/// `comm::nccl::create`.
inline std::shared_ptr<rank_state> create(int rank, int size, const comm::nccl::all_gather_function& all_gather,
                                          const comm::nccl_options& options) {
  TESSERA_EXPECTS(size >= 1 && rank >= 0 && rank < size,
                  "comm::nccl::create: rank = " << rank << " of size = " << size << " ranks");
  TESSERA_EXPECTS(all_gather != nullptr, "comm::nccl::create: the all-gather is empty");
  expect_options(options);
  const rank_card own = own_card(rank);
  std::vector<rank_card> cards(static_cast<std::size_t>(size));
  all_gather(&own, cards.data(), sizeof(own));
  expect_cards(cards);
  auto state = std::make_shared<rank_state>(options, nullptr, rank);
  ncclConfig_t config = state->configuration();
  state->complete(ncclCommInitRankConfig(state->slot(), size, cards[0].id, rank, &config), "ncclCommInitRankConfig",
                  "create");
  state->learn("create", true);
  return state;
}

/// `comm::nccl::create_all`.
inline std::vector<std::shared_ptr<rank_state>> create_all(std::span<const int> devices,
                                                           const comm::nccl_options& options) {
  const std::string problem = version_problem();
  TESSERA_EXPECTS_AS(nccl_error, problem.empty(), "comm::nccl::create_all: " << problem);
  int found = 0;
  check_cuda(cudaGetDeviceCount(&found), "cudaGetDeviceCount");
  TESSERA_EXPECTS(!devices.empty(), "comm::nccl::create_all: no device is given, at least one is needed");
  for (std::size_t i = 0; i < devices.size(); ++i) {
    TESSERA_EXPECTS(devices[i] >= 0 && devices[i] < found,
                    "comm::nccl::create_all: there is no device " << devices[i] << ", CUDA finds " << found);
    for (std::size_t j = 0; j < i; ++j) {
      TESSERA_EXPECTS(devices[i] != devices[j], "comm::nccl::create_all: device " << devices[i]
                                                                                  << " is given twice, each rank needs "
                                                                                     "one of its own");
    }
  }
  const int size = static_cast<int>(devices.size());
  std::vector<std::shared_ptr<rank_state>> states;
  for (int rank = 0; rank < size; ++rank) {
    const device_guard guard(devices[static_cast<std::size_t>(rank)]);
    states.push_back(std::make_shared<rank_state>(options, nullptr, rank));
  }
  ncclUniqueId id{};
  states[0]->complete(ncclGetUniqueId(&id), "ncclGetUniqueId", "create_all");
  const device_guard restore(devices[0]);
  try {
    ncclResult_t result = ncclGroupStart();
    states[0]->complete(result, "ncclGroupStart", "create_all");
    for (int rank = 0; rank < size && (result == ncclSuccess || result == ncclInProgress); ++rank) {
      rank_state& state = *states[static_cast<std::size_t>(rank)];
      static_cast<void>(cudaSetDevice(state.device()));  // has been current above
      ncclConfig_t config = state.configuration();
      result = ncclCommInitRankConfig(state.slot(), size, id, rank, &config);
    }
    const ncclResult_t ended = ncclGroupEnd();
    if (result == ncclSuccess || result == ncclInProgress) result = ended;
    for (auto& state : states) {
      state->complete(result, "ncclCommInitRankConfig", "create_all");
      state->learn("create_all", true);
    }
  } catch (const std::exception& e) {  // none of them is left to wait for the others
    for (auto& state : states) state->fail(e.what());
    throw;
  }
  return states;
}

}  // namespace detail::nccl

TESSERA_NAMESPACE_END
