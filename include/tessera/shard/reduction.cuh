// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of the sums of gradients: the bits of the host half with `reduction::ordered`. Enqueues; allocates
/// nothing and waits for nothing.

#include <algorithm>
#include <cstdint>
#include <span>

#include <cuda_runtime.h>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/ordered_reduce.cuh>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/shard/detail/device/checks.cuh>
#include <tessera/shard/reduction.hpp>

TESSERA_NAMESPACE_BEGIN
namespace reduction {

template <device_communicator Comm, accumulate_type A>
void native::join(device_stream stream, Comm* replicate, const A* in, std::span<const std::int64_t>, std::int64_t count,
                  A* out, workspace_memory) {
  if (replicate != nullptr) {
    replicate->all_reduce(stream, in, out, count);
  } else {
    shard::detail::copy_elements(stream, in, out, count);
  }
}

template <device_communicator Comm, accumulate_type A>
std::int64_t ordered::scatter(device_stream stream, Comm& comm, const A* packed, std::span<const std::int64_t> chunks,
                              std::int64_t count, A* out, workspace_memory) {
  const int ranks = comm.size();
  const int rank = comm.rank();
  TESSERA_EXPECTS(static_cast<int>(chunks.size()) == ranks, "reduction::ordered: chunks are given for "
                                                                << chunks.size() << " ranks, the communicator has "
                                                                << ranks);
  const auto chunks_of = [&](int r) { return chunks[static_cast<std::size_t>(r)]; };
  const auto rows_before = [&](int r) {
    std::int64_t rows = 0;
    for (int peer = 0; peer < r; ++peer) rows += chunks_of(peer);
    return rows;
  };
  std::int64_t most = 0;
  for (const std::int64_t n : chunks) most = (std::max)(most, n);
  // A message of one's own is a copy of the communicator's.
  tessera::detail::message_rounds<Comm> rounds(stream, comm);
  for (std::int64_t chunk = 0; chunk < most; ++chunk) {
    for (int shift = 0; shift < ranks; ++shift) {
      const int to = (rank + shift) % ranks;
      const int from = (rank - shift + ranks) % ranks;
      transfer send{to, nullptr, 0};
      transfer receive{from, nullptr, 0};
      if (chunk < chunks_of(rank)) send = send_to(to, packed + (chunk * ranks + to) * count, count);
      if (chunk < chunks_of(from)) receive = receive_from(from, out + (rows_before(from) + chunk) * count, count);
      rounds.add(send, receive);
    }
  }
  rounds.flush();
  return rows_before(ranks);
}

template <device_communicator Comm, accumulate_type A>
void ordered::join(device_stream stream, Comm* replicate, const A* in, std::span<const std::int64_t> rows,
                   std::int64_t count, A* out, workspace_memory workspace) {
  if (replicate != nullptr) {
    memory_builder builder(workspace, "reduction workspace");
    ordered_all_reduce(stream, *replicate, in, rows, count, out, builder);
  } else {
    std::int64_t total = 0;
    for (const std::int64_t n : rows) total += n;
    tessera::detail::sum_chunks<A>(stream, {in, nullptr, 0, 0, 0, total}, count, out);
  }
}

}  // namespace reduction
TESSERA_NAMESPACE_END
