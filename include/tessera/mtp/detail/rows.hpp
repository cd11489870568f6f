// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Definitions of mtp/rows.hpp, and the lists of a depth.

#include <algorithm>
#include <cstdint>
#include <span>

#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/mtp/rows.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp::detail {

inline void expect_offsets(std::span<const std::int32_t> offsets, std::int64_t rows, const char* name) {
  if (offsets.empty()) return;
  TESSERA_EXPECTS(offsets.front() == 0 && offsets.back() == rows, name << " run from " << offsets.front() << " to "
                                                                       << offsets.back() << ", they must run from 0 to "
                                                                       << rows);
  for (std::size_t i = 1; i < offsets.size(); ++i)
    TESSERA_EXPECTS(offsets[i - 1] <= offsets[i], name << "[" << i - 1 << "] = " << offsets[i - 1] << " exceeds "
                                                       << name << "[" << i << "] = " << offsets[i]);
}

// Number of rows T.
inline std::int64_t expect_batch(const batch& in) {
  const auto rows = static_cast<std::int64_t>(in.token_ids.size());
  TESSERA_EXPECTS(rows <= INT32_MAX, "mtp: " << rows << " rows, at most 2^31 - 1 are possible");
  TESSERA_EXPECTS(
      in.targets.size() == in.token_ids.size() && (in.positions.empty() || in.positions.size() == in.token_ids.size()),
      "mtp: " << rows << " token ids, " << in.targets.size() << " targets and " << in.positions.size()
              << " positions: all must have one entry per row (positions may be empty)");
  expect_offsets(in.sequence_offsets, rows, "mtp: sequence_offsets");
  expect_offsets(in.chunk_offsets, rows, "mtp: chunk_offsets");
  return rows;
}

// visit(first, last) for each document, in order; none is empty.
template <class Visit>
void for_each_document(const batch& in, Visit&& visit) {
  const auto rows = static_cast<std::int32_t>(in.token_ids.size());
  const std::size_t sequences = in.sequence_offsets.empty() ? 1 : in.sequence_offsets.size() - 1;
  for (std::size_t s = 0; s < sequences; ++s) {
    const std::int32_t end = in.sequence_offsets.empty() ? rows : in.sequence_offsets[s + 1];
    std::int32_t first = in.sequence_offsets.empty() ? 0 : in.sequence_offsets[s];
    while (first < end) {
      std::int32_t last = first + 1;
      if (in.positions.empty()) {
        last = end;
      } else {
        const auto position = [&](std::int32_t row) {
          return static_cast<std::int64_t>(in.positions[static_cast<std::size_t>(row)]);
        };
        while (last < end && position(last) == position(last - 1) + 1) ++last;
      }
      visit(first, last);
      first = last;
    }
  }
}

// Memory of `depth_rows`.
struct row_lists {
  std::int32_t* rows = nullptr;
  std::int32_t* token_ids = nullptr;
  std::int32_t* targets = nullptr;
  std::int32_t* positions = nullptr;
  std::int32_t* sequence_offsets = nullptr;
  std::int32_t* chunk_offsets = nullptr;

  static row_lists layout(memory_builder& memory, std::int64_t max_rows, std::int64_t max_chunks) {
    row_lists lists;
    lists.rows = memory.take<std::int32_t>("mtp.rows", max_rows);
    lists.token_ids = memory.take<std::int32_t>("mtp.token_ids", max_rows);
    lists.targets = memory.take<std::int32_t>("mtp.targets", max_rows);
    lists.positions = memory.take<std::int32_t>("mtp.positions", max_rows);
    lists.sequence_offsets = memory.take<std::int32_t>("mtp.sequence_offsets", max_rows + 1);
    lists.chunk_offsets = memory.take<std::int32_t>("mtp.chunk_offsets", max_chunks + 1);
    return lists;
  }

  depth_rows view(int depth, std::int64_t count, std::int64_t documents, std::int64_t chunks) const {
    const auto part = [](const std::int32_t* data, std::int64_t size) {
      return std::span<const std::int32_t>(data, static_cast<std::size_t>(size));
    };
    return {.depth = depth,
            .rows = part(rows, count),
            .token_ids = part(token_ids, count),
            .targets = part(targets, count),
            .positions = part(positions, count),
            .sequence_offsets = part(sequence_offsets, documents + 1),
            .chunk_offsets = part(chunk_offsets, chunks + 1)};
  }
};

// Offsets of the documents, and their number.
inline std::int64_t list_documents(const batch& in, std::int32_t* offsets) {
  std::int64_t documents = 0;
  offsets[0] = 0;
  for_each_document(in, [&](std::int32_t, std::int32_t last) { offsets[++documents] = last; });
  return documents;
}

inline std::int64_t count_chunks(const batch& in) {
  return in.chunk_offsets.empty() ? 1 : static_cast<std::int64_t>(in.chunk_offsets.size()) - 1;
}

// Fills the lists of depth k, and answers how many rows it has.
inline std::int64_t list_rows(const batch& in, const std::int32_t* documents, std::int64_t num_documents, int depth,
                              row_policy policy, const row_lists& lists) {
  std::int32_t count = 0;
  lists.sequence_offsets[0] = 0;
  const auto at = [](std::span<const std::int32_t> values, std::int64_t row) {
    return values[static_cast<std::size_t>(row)];
  };
  std::int32_t sequence_end = 0, sequence_start = 0;
  std::size_t sequence = 0;
  for (std::int64_t n = 0; n < num_documents; ++n) {
    const std::int32_t first = documents[n], last = documents[n + 1];
    while (first >= sequence_end && !in.sequence_offsets.empty()) {  // the sequence that the document is in
      sequence_start = in.sequence_offsets[sequence];
      sequence_end = in.sequence_offsets[++sequence];
    }
    for (std::int32_t row = first; row < last; ++row) {
      const bool valid = static_cast<std::int64_t>(row) + depth < last;
      if (!valid && policy == row_policy::valid) break;
      lists.rows[count] = row;
      lists.token_ids[count] = valid ? at(in.token_ids, static_cast<std::int64_t>(row) + depth) : -1;
      lists.targets[count] = valid ? at(in.targets, static_cast<std::int64_t>(row) + depth) : -1;
      lists.positions[count] = in.positions.empty() ? row - sequence_start : at(in.positions, row);
      ++count;
    }
    lists.sequence_offsets[n + 1] = count;
  }
  const std::int64_t chunks = count_chunks(in);
  lists.chunk_offsets[0] = 0;
  for (std::int64_t c = 1; c <= chunks; ++c)
    lists.chunk_offsets[c] =
        in.chunk_offsets.empty()
            ? count
            : static_cast<std::int32_t>(std::lower_bound(lists.rows, lists.rows + count, at(in.chunk_offsets, c)) -
                                        lists.rows);
  return count;
}

}  // namespace mtp::detail

namespace mtp {

inline void count_terms(const batch& in, std::span<std::int64_t> counts) {
  detail::expect_batch(in);
  std::fill(counts.begin(), counts.end(), std::int64_t{0});
  detail::for_each_document(in, [&](std::int32_t first, std::int32_t last) {
    for (std::size_t k = 1; k <= counts.size(); ++k)
      for (std::int64_t row = first + static_cast<std::int64_t>(k); row < last; ++row)
        counts[k - 1] += in.targets[static_cast<std::size_t>(row)] >= 0 ? 1 : 0;
  });
}

}  // namespace mtp

TESSERA_NAMESPACE_END
