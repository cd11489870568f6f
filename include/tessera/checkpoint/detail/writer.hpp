// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One rank's file of tensors: where its elements come from, and how they get into it.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <tessera/checkpoint/detail/box_copy.hpp>
#include <tessera/checkpoint/detail/checksum.hpp>
#include <tessera/checkpoint/detail/files.hpp>
#include <tessera/checkpoint/detail/pieces.hpp>
#include <tessera/checkpoint/detail/slabs.hpp>
#include <tessera/checkpoint/detail/tiling.hpp>
#include <tessera/checkpoint/plan.hpp>
#include <tessera/checkpoint/safetensors.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

/// Name of a rank's file.
inline std::string rank_file_name(int rank) {
  const std::string digits = std::to_string(rank);
  return "rank-" + std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits + ".safetensors";
}

/// Where the elements of a chunk are: in an array that holds `held`.
struct chunk_source {
  const void* data = nullptr;
  box held;
  stride_array strides{};
};

/// For each chunk that a rank writes, in the order of its file.
using chunk_sources = std::vector<chunk_source>;

/// Finds this rank's chunks among its pieces.
inline chunk_sources find_sources(const save_plan& plan, int rank, std::span<const source_piece> pieces) {
  std::unordered_map<std::string_view, std::vector<const source_piece*>> by_name;
  for (const source_piece& piece : pieces) {
    expect_piece(piece);
    TESSERA_EXPECTS(piece.data != nullptr || piece.part.empty(), "tensor '" << piece.name << "' has no data");
    by_name[piece.name].push_back(&piece);
  }
  chunk_sources sources;
  for (const std::int64_t index : plan.writes[static_cast<std::size_t>(rank)]) {
    const planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(index)];
    const planned_tensor& tensor = plan.tensors[static_cast<std::size_t>(chunk.tensor)];
    chunk_source found{nullptr, chunk.part, {}};
    bool is_there = false;
    if (const auto place = by_name.find(tensor.name); place != by_name.end()) {
      for (const source_piece* piece : place->second) {
        if (piece->type != tensor.type || piece->whole != tensor.whole || !piece->part.contains(chunk.part)) continue;
        found = {piece->data, piece->part, strides_or_packed(piece->strides, piece->part)};
        is_there = true;
        break;
      }
    }
    TESSERA_EXPECTS(is_there, "the plan lets rank " << rank << " write " << text_of(chunk.part) << " of tensor '"
                                                    << tensor.name << "', which is not among its pieces");
    sources.push_back(found);
  }
  return sources;
}

/// Copies all chunks of this rank one after another into `staging`, of `plan.bytes[rank]` bytes, and lets the sources
/// point there.
inline void stage(const save_plan& plan, int rank, chunk_sources& sources, std::byte* staging) {
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(plan.writes[static_cast<std::size_t>(rank)][i])];
    const element_type type = plan.tensors[static_cast<std::size_t>(chunk.tensor)].type;
    const chunk_source staged{staging + chunk.begin, chunk.part, packed_strides(chunk.part)};
    if (!chunk.part.empty()) {
      copy_box(chunk.part, sources[i].data, sources[i].held, sources[i].strides, staging + chunk.begin, chunk.part,
               staged.strides, size_of(type));
    }
    sources[i] = staged;
  }
}

/// What the manifest must know of a file.
struct written_file {
  std::int64_t bytes = 0;
  std::int64_t header_bytes = 0;
  std::uint64_t header_checksum = 0;
  std::vector<std::vector<std::uint64_t>> checksums;  // of each chunk, in the order of the file
};

/// Writes the file of this rank.
inline written_file write_rank_file(const save_plan& plan, int rank, const chunk_sources& sources,
                                    const std::string& path, bool sync, const io_observer& observer) {
  const std::vector<std::int64_t>& writes = plan.writes[static_cast<std::size_t>(rank)];
  std::vector<safetensors_entry> entries;
  for (const std::int64_t index : writes) {
    const planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(index)];
    const element_type type = plan.tensors[static_cast<std::size_t>(chunk.tensor)].type;
    entries.push_back({chunk.entry,
                       type,
                       {chunk.part.size, chunk.part.size + chunk.part.rank},
                       chunk.begin,
                       chunk.begin + chunk.part.volume() * size_of(type)});
  }
  const std::string header = make_safetensors_header(entries, {{"format", "tessera"}});
  written_file result;
  result.header_bytes = static_cast<std::int64_t>(header.size());
  result.header_checksum = checksum_of(header);
  result.bytes = result.header_bytes + plan.bytes[static_cast<std::size_t>(rank)];

  file target = file::create(path, observer);
  target.write(header.data(), result.header_bytes, 0, observer);
  std::unique_ptr<std::byte[]> packed;  // one block of what is not contiguous
  std::int64_t started = 0;
  for (std::size_t i = 0; i < writes.size(); ++i) {
    const planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(writes[i])];
    const chunk_source& source = sources[i];
    const std::int64_t width = size_of(plan.tensors[static_cast<std::size_t>(chunk.tensor)].type);
    const slab_division slabs(chunk.part, width, plan.block_bytes);
    std::vector<std::uint64_t>& checksums = result.checksums.emplace_back();
    for (std::int64_t k = 0; k < slabs.count(); ++k) {
      const box slab = slabs[k];
      const std::int64_t bytes = slab.volume() * width;
      const std::byte* data = nullptr;
      if (is_contiguous(slab, source.strides)) {
        data = static_cast<const std::byte*>(source.data) + offset_in(source.held, source.strides, slab) * width;
      } else {
        if (packed == nullptr) {
          packed =
              std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(std::max(plan.block_bytes, width)));
        }
        copy_box(slab, source.data, source.held, source.strides, packed.get(), slab, packed_strides(slab), width);
        data = packed.get();
      }
      checksums.push_back(checksum_of(data, bytes));
      const std::int64_t place = result.header_bytes + chunk.begin + chunk.part.local_offset(slab) * width;
      target.write(data, bytes, place, observer);
      constexpr std::int64_t stride = std::int64_t{16} << 20;
      if (sync && place + bytes - started >= stride) {
        target.start_writing(started, place + bytes - started);
        started = place + bytes;
      }
    }
  }
  if (sync) target.sync(observer);
  target.close();
  return result;
}

inline std::string packed_description(const written_file& written) {
  packer target;
  target.put(written.bytes);
  target.put(written.header_bytes);
  target.put(static_cast<std::int64_t>(written.header_checksum));
  for (const std::vector<std::uint64_t>& checksums : written.checksums) {
    target.put(static_cast<std::int64_t>(checksums.size()));
    for (const std::uint64_t checksum : checksums) target.put(static_cast<std::int64_t>(checksum));
  }
  return target.bytes();
}

inline written_file unpacked_description(const std::string& bytes) {
  unpacker source(bytes.data(), static_cast<std::int64_t>(bytes.size()));
  written_file written;
  written.bytes = source.number();
  written.header_bytes = source.number();
  written.header_checksum = static_cast<std::uint64_t>(source.number());
  while (!source.done()) {
    std::vector<std::uint64_t>& checksums = written.checksums.emplace_back(static_cast<std::size_t>(source.number()));
    for (std::uint64_t& checksum : checksums) checksum = static_cast<std::uint64_t>(source.number());
  }
  return written;
}

/// The manifest of a save, from the plan and what all ranks wrote. Ranks that write nothing have no file.
inline manifest make_manifest(const save_plan& plan, const train_state& state,
                              const std::vector<written_file>& written) {
  manifest content;
  content.num_ranks = plan.num_ranks;
  content.block_bytes = plan.block_bytes;
  content.state = state;
  std::vector<std::int32_t> file_of(written.size(), -1);
  for (std::size_t rank = 0; rank < written.size(); ++rank) {
    if (plan.writes[rank].empty()) continue;
    file_of[rank] = static_cast<std::int32_t>(content.files.size());
    content.files.push_back({rank_file_name(static_cast<int>(rank)), written[rank].bytes, written[rank].header_bytes,
                             written[rank].header_checksum});
  }
  std::vector<const std::vector<std::uint64_t>*> checksums(plan.chunks.size());
  for (std::size_t rank = 0; rank < written.size(); ++rank) {
    for (std::size_t i = 0; i < plan.writes[rank].size(); ++i) {
      checksums[static_cast<std::size_t>(plan.writes[rank][i])] = &written[rank].checksums[i];
    }
  }
  for (const planned_tensor& tensor : plan.tensors) {
    manifest_tensor& target = content.tensors.emplace_back();
    target.name = tensor.name;
    target.type = tensor.type;
    target.whole = tensor.whole;
    target.placement = tensor.placement;
    for (std::int64_t i = tensor.first_chunk; i < tensor.first_chunk + tensor.num_chunks; ++i) {
      const planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(i)];
      const auto writer = static_cast<std::size_t>(chunk.writer);
      target.chunks.push_back({chunk.part, file_of[writer], chunk.entry, written[writer].header_bytes + chunk.begin,
                               *checksums[static_cast<std::size_t>(i)]});
    }
  }
  return content;
}

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
