// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// The messages of one side of an exchange, in the caller's array.
struct block_messages {
  transfer* list;
  std::size_t count = 0;

  // Rows `[offsets[rank], offsets[rank + 1])` of `data`, of `width` elements, to or from `rank`; no message for none.
  template <class T>
  void add(int rank, T* data, const std::int32_t* offsets, std::int64_t width = 1) {
    const std::int64_t rows = offsets[rank + 1] - offsets[rank];
    if (rows == 0) return;
    list[count++] = {rank, data + offsets[rank] * width, rows * width * static_cast<std::int64_t>(sizeof(T))};
  }
  std::span<const transfer> all() const { return {list, count}; }
};

// Sends each rank its block of `outgoing`, and receives its block of `arriving`: rows of `width` elements.
template <class Comm, class T>
void exchange_blocks(host_stream stream, Comm& comm, T* outgoing, const std::int32_t* outgoing_offsets, T* arriving,
                     const std::int32_t* arriving_offsets, std::int64_t width, transfer* sends, transfer* receives) {
  block_messages sent{sends};
  block_messages received{receives};
  for (int r = 0; r < comm.size(); ++r) {
    sent.add(r, outgoing, outgoing_offsets, width);
    received.add(r, arriving, arriving_offsets, width);
  }
  comm.exchange(stream, sent.all(), received.all());
}

}  // namespace detail

TESSERA_NAMESPACE_END
