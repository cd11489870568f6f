// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include <tessera/pipeline/mirrored_gradients.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

namespace detail {

// The places of a stage, and its contributions in the order in which they are added.
struct mirrored_stage {
  struct addend {
    std::size_t at;    // in places
    std::int64_t row;  // of the gradients there
  };

  mirrored_stage(const schedule& s, int stage, gradient_order order) {
    for (const route& way : s.routes) {
      const place p = way[static_cast<std::size_t>(stage)];
      if (std::find(places.begin(), places.end(), p) != places.end()) continue;
      TESSERA_EXPECTS(index_of(p.rank) == places.size(),
                      "sum_mirrored_gradients: rank " << p.rank << " holds stage " << stage << " twice");
      places.push_back(p);
      // What no micro-batch passes has written nothing; it gets the sum all the same.
      rows.push_back(micro_batches_at(s, p.rank, p.chunk).empty() ? 0 : gradient_rows_of(s, p, order));
    }
    if (order == gradient_order::schedule) {
      for (std::size_t at = 0; at < places.size(); ++at)
        if (rows[at] > 0) addends.push_back({at, 0});
      return;
    }
    for (int m = 0; m < s.num_micro_batches; ++m) {
      const place p = s.place_of(stage, m);
      const addend next{index_of(p.rank), gradient_row_of(s, p, m)};
      const bool same = !addends.empty() && addends.back().at == next.at && addends.back().row == next.row;
      if (!same) addends.push_back(next);  // the first ones were added where they arose
    }
  }

  // Number of the place on `rank`, places.size() if there is none.
  std::size_t index_of(int rank) const {
    const auto found = std::find_if(places.begin(), places.end(), [&](const place& p) { return p.rank == rank; });
    return static_cast<std::size_t>(found - places.begin());
  }

  std::vector<place> places;
  std::vector<std::int64_t> rows;  // of each place
  std::vector<addend> addends;
};

// `result = ((r0 + r1) + r2) + ...` over rows of `size` elements; `result` may be one of them.
template <accumulate_type G>
void sum_rows(host_stream, std::span<const G* const> rows, std::int64_t size, G* sum, G* result) {
  std::copy_n(rows[0], size, sum);
  for (std::size_t k = 1; k < rows.size(); ++k) {
    for (std::int64_t i = 0; i < size; ++i) sum[i] += rows[k][i];
  }
  std::copy_n(sum, size, result);
}
// The same in device memory; defined in `mirrored_gradients.cuh`.
template <accumulate_type G>
void sum_rows(device_stream stream, std::span<const G* const> rows, std::int64_t size, G* sum, G* result);

}  // namespace detail

template <accumulate_type G>
std::size_t sum_mirrored_gradients_workspace_bytes(const schedule& s, gradient_order order,
                                                   std::int64_t block_elements) {
  TESSERA_EXPECTS(block_elements >= 1,
                  "sum_mirrored_gradients: block_elements = " << block_elements << ", at least 1 is needed");
  std::int64_t most = 0;
  for (int stage = 0; stage < s.num_stages; ++stage) {
    const std::vector<std::int64_t> rows = detail::mirrored_stage(s, stage, order).rows;
    most = std::max(most, std::accumulate(rows.begin(), rows.end(), std::int64_t{0}));
  }
  memory_builder counting;
  counting.take<G>("sum", block_elements);
  counting.take<G>("contributions of other places", most * block_elements);
  return counting.bytes();
}

template <communicator Comm, accumulate_type G>
void sum_mirrored_gradients(stream_ref<typename Comm::space> stream, Comm& comm, const schedule& s,
                            gradient_order order, std::span<const stage_gradients<G>> gradients,
                            workspace_memory workspace, std::int64_t block_elements) {
  TESSERA_EXPECTS(
      s.num_ranks == comm.size() && static_cast<int>(gradients.size()) == s.num_chunks && block_elements >= 1,
      "sum_mirrored_gradients: schedule " << s.name << " has " << s.num_ranks << " ranks and " << s.num_chunks
                                          << " stages per rank; given are " << comm.size() << " ranks, "
                                          << gradients.size() << " gradients and block_elements = " << block_elements);
  std::vector<transfer> sends;
  std::vector<transfer> receives;
  std::vector<const G*> received;
  std::vector<const G*> addends;
  for (int stage = 0; stage < s.num_stages; ++stage) {  // ascending on all ranks: nobody waits in a circle
    const detail::mirrored_stage m(s, stage, order);
    const std::size_t own = m.index_of(comm.rank());
    if (m.places.size() < 2 || m.addends.empty() || own == m.places.size()) continue;
    const stage_gradients<G>& local = gradients[static_cast<std::size_t>(m.places[own].chunk)];
    TESSERA_EXPECTS(
        local.count >= 0 && (local.data != nullptr || local.count == 0),
        "sum_mirrored_gradients: the gradients of stage " << stage << " have no data, or count = " << local.count);
    for (std::int64_t begin = 0; begin < local.count; begin += block_elements) {
      // Every place adds up its piece of the block.
      const std::int64_t block = std::min(block_elements, local.count - begin);
      const auto piece_begin = [&](std::size_t p) {
        return begin + block * static_cast<std::int64_t>(p) / static_cast<std::int64_t>(m.places.size());
      };
      const auto piece_size = [&](std::size_t p) { return piece_begin(p + 1) - piece_begin(p); };
      const std::int64_t size = piece_size(own);
      memory_builder builder(workspace, "workspace of sum_mirrored_gradients");
      G* const sum = builder.take<G>("sum", size);
      std::int64_t remote_rows = 0;
      for (std::size_t p = 0; p < m.places.size(); ++p) remote_rows += p == own ? 0 : m.rows[p];
      G* arriving = builder.take<G>("contributions of other places", remote_rows * size);

      sends.clear();
      receives.clear();
      received.assign(m.places.size(), nullptr);
      for (std::size_t p = 0; p < m.places.size(); ++p) {
        if (p == own) continue;
        const int peer = m.places[p].rank;
        for (std::int64_t row = 0; row < m.rows[own]; ++row)
          sends.push_back(send_to(peer, local.data + row * local.count + piece_begin(p), piece_size(p)));
        received[p] = arriving;
        for (std::int64_t row = 0; row < m.rows[p]; ++row, arriving += size)
          receives.push_back(receive_from(peer, arriving, size));
      }
      comm.exchange(stream, sends, receives);

      G* const result = local.data + piece_begin(own);
      const auto row_of = [&](const detail::mirrored_stage::addend& a) -> const G* {
        return a.at == own ? result + a.row * local.count : received[a.at] + a.row * size;
      };
      addends.clear();
      for (const detail::mirrored_stage::addend& a : m.addends) addends.push_back(row_of(a));
      detail::sum_rows(stream, std::span<const G* const>(addends), size, sum, result);

      sends.clear();
      receives.clear();
      for (std::size_t p = 0; p < m.places.size(); ++p) {
        if (p == own) continue;
        sends.push_back(send_to(m.places[p].rank, result, size));
        receives.push_back(receive_from(m.places[p].rank, local.data + piece_begin(p), piece_size(p)));
      }
      comm.exchange(stream, sends, receives);
    }
  }
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
