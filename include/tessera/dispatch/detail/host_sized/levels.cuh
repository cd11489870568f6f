// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/detail/host_sized/add_rows.cuh>
#include <tessera/dispatch/detail/host_sized/find_rows.cuh>
#include <tessera/dispatch/host_sized.hpp>

// How rows travel over the levels of a dispatch that is sized on the host, and how their numbers come there.

TESSERA_NAMESPACE_BEGIN

namespace detail::host_sized {

// The communicators of both levels.
template <class Comm>
auto& within_host(Comm& comm, const host_grid& grid) {
  if constexpr (requires { comm.within_host(); }) {
    return grid.two_levels() ? comm.within_host() : comm.over();
  } else {
    static_cast<void>(grid);
    return comm;
  }
}
template <class Comm>
auto& across_hosts(Comm& comm) {
  if constexpr (requires { comm.across_hosts(); }) {
    return comm.across_hosts();
  } else {
    return comm;  // one level: nothing goes over it
  }
}

inline void expect_no_capture(device_stream stream, const char* operation) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream.get(), &capture), "cudaStreamIsCapturing");
  TESSERA_EXPECTS(capture == cudaStreamCaptureStatusNone,
                  operation << " that is sized on the host cannot be captured in a CUDA graph, the host reads counts: "
                               "enqueue it, or dispatch over comm::symmetric where GPUs share memory");
}

inline unsigned blocks_for(std::int64_t items, int threads) {
  return static_cast<unsigned>(std::max<std::int64_t>((items + threads - 1) / threads, 1));
}

// Arguments of an all-to-all in rows.
struct row_blocks {
  using sizes = std::array<std::int64_t, max_host_sized_ranks>;
  sizes counts{}, offsets{};

  // @param gap Whether rows of `own` have no place among the others.
  row_blocks(const level_counts::offsets& from, int ranks, int own, bool gap, std::int64_t width) {
    std::int64_t left_out = 0;
    for (int r = 0; r < ranks; ++r) {
      const auto i = static_cast<std::size_t>(r);
      const std::int64_t rows = from[i + 1] - from[i];
      offsets[i] = (from[i] - left_out) * width;
      counts[i] = r == own ? 0 : rows * width;
      if (r == own && gap) left_out = rows;
    }
  }
};

// Rows for others out, rows of others in. @param width Elements of a row.
template <class Comm, class S>
void send_rows(device_stream stream, Comm& comm, const level_counts& counts, const S* sent, S* received,
               std::int64_t width) {
  const row_blocks out(counts.sent, comm.size(), comm.rank(), false, width);
  const row_blocks in(counts.received, comm.size(), comm.rank(), false, width);
  comm.all_to_all_v(stream, sent, out.counts.data(), out.offsets.data(), received, in.counts.data(), in.offsets.data());
}

// The way back: a row for each that came from others, packed, to where those were sent.
template <class Comm, class S>
void return_rows(device_stream stream, Comm& comm, const level_counts& counts, const S* sums, S* returned,
                 std::int64_t width) {
  const row_blocks out(counts.received, comm.size(), comm.rank(), true, width);
  const row_blocks in(counts.sent, comm.size(), comm.rank(), false, width);
  comm.all_to_all_v(stream, sums, out.counts.data(), out.offsets.data(), returned, in.counts.data(), in.offsets.data());
}

// The way home on all levels: `add(tokens, within, across, rows, sums)` makes the sums of `rows` tokens, to `sums` or
// home where that is null.
template <class T, class Comm, class Add>
void bring_home(device_stream stream, Comm& comm, const host_sized_counts& counts, const host_sized_lists& lists,
                const host_sized_buffers& buffers, std::int64_t max_tokens, std::int64_t num_tokens, std::int64_t width,
                Add add) {
  const token_grid tokens{counts.grid, counts.rank, static_cast<int>(max_tokens)};
  auto& inside = within_host(comm, counts.grid);
  const auto of_arrived = [&](const level_lists& level, const level_counts& of, int own, bool rail) {
    const auto at = static_cast<std::size_t>(own);
    return token_list{tokens, level.arrived, 0, of.received[at], static_cast<int>(of.own_rows(own)), rail};
  };
  const auto others = [](const level_counts& of, int ranks, int own) {
    return of.received[static_cast<std::size_t>(ranks)] - of.own_rows(own);
  };
  const brought_rows<T> nothing{};
  T* const sums = reinterpret_cast<T*>(buffers.sums);
  T* const back_within = reinterpret_cast<T*>(buffers.within);
  add(of_arrived(lists.within, counts.within, tokens.place(), false), nothing, nothing,
      others(counts.within, inside.size(), tokens.place()), sums);
  return_rows(stream, inside, counts.within, sums, back_within, width);
  const brought_rows<T> within{back_within, lists.within, inside.size()};
  brought_rows<T> across{};
  if (counts.grid.two_levels()) {
    T* const middle = reinterpret_cast<T*>(buffers.middle);
    T* const back_across = reinterpret_cast<T*>(buffers.across);
    auto& rail = across_hosts(comm);
    add(of_arrived(lists.across, counts.across, tokens.host(), true), within, nothing,
        others(counts.across, rail.size(), tokens.host()), middle);
    return_rows(stream, rail, counts.across, middle, back_across, width);
    across = {back_across, lists.across, rail.size()};
  }
  const token_list own{tokens, nullptr, tokens.host() * tokens.max_tokens, 0, 0, true};
  add(own, within, across, num_tokens, static_cast<T*>(nullptr));
}

inline void expect_counts(const host_sized_counts& counts, int ranks, int rank) {
  TESSERA_EXPECTS(counts.grid.num_ranks == ranks && counts.rank == rank,
                  "the counts are those of rank " << counts.rank << " of " << counts.grid.num_ranks << ", this is rank "
                                                  << rank << " of " << ranks
                                                  << ": take them from exchange_routing or read_counts");
}

// The list that the communicator's words were read from, noted behind them.
inline const std::int32_t** source_of(std::span<std::int32_t> words) {
  return reinterpret_cast<const std::int32_t**>(words.data() + words.size()) - 1;
}

// Brings the words of the lists to the host. Waits.
template <class Comm>
const std::int32_t* read_words(device_stream stream, Comm& comm, const std::int32_t* words, std::int64_t count) {
  const std::span<std::int32_t> pinned = comm.host_words();
  constexpr auto note = static_cast<std::int64_t>(sizeof(const std::int32_t*) / sizeof(std::int32_t));
  TESSERA_EXPECTS(static_cast<std::int64_t>(pinned.size()) >= count + note,
                  "the counts of " << comm.size() << " ranks are " << count << " words, the communicator has room for "
                                   << pinned.size());
  check_cuda(cudaMemcpyAsync(pinned.data(), words, static_cast<std::size_t>(count) * sizeof(*words),
                             cudaMemcpyDeviceToHost, stream.get()),
             "cudaMemcpyAsync");
  *source_of(pinned) = nullptr;
  comm.wait(stream);
  *source_of(pinned) = words;
  return pinned.data();
}

}  // namespace detail::host_sized

TESSERA_NAMESPACE_END
