// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of checkpoints: copies through pinned memory around the host half. There is no kernel in it.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/checkpoint/detail/agree.hpp>
#include <tessera/checkpoint/detail/box_copy.hpp>
#include <tessera/checkpoint/detail/device/copier.cuh>
#include <tessera/checkpoint/detail/writer.hpp>
#include <tessera/checkpoint/device_memory.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

template <class Comm>
device_saver<Comm>::device_saver(Comm& comm, save_options options, const device_copy_options& copies)
    : comm_(&comm),
      copier_(std::make_unique<detail::device_copier>(copies.pinned_bytes)),
      saver_(comm, std::move(options)) {}

template <class Comm>
device_saver<Comm>::~device_saver() = default;

template <class Comm>
void device_saver<Comm>::save_async(device_stream stream, const save_plan& plan, std::span<const source_piece> pieces,
                                    const train_state& state) {
  wait();  // its share is in the staging memory
  std::vector<detail::device_part> parts;
  std::vector<source_piece> staged;  // this rank's chunks, where they will be in host memory
  detail::together(*comm_, [&] {
    TESSERA_EXPECTS(plan.num_ranks == comm_->size(),
                    "the plan is for " << plan.num_ranks << " ranks, the communicator has " << comm_->size());
    const auto rank = static_cast<std::size_t>(comm_->rank());
    const detail::chunk_sources sources = detail::find_sources(plan, comm_->rank(), pieces);
    staging_.reserve(plan.bytes[rank]);
    for (std::size_t i = 0; i < sources.size(); ++i) {
      const planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(plan.writes[rank][i])];
      const planned_tensor& tensor = plan.tensors[static_cast<std::size_t>(chunk.tensor)];
      std::byte* const place = staging_.data() + chunk.begin;
      staged.push_back({{tensor.name, tensor.type, tensor.whole, chunk.part, tensor.placement}, place});
      if (chunk.part.empty()) continue;
      const auto* const device = static_cast<const std::byte*>(sources[i].data);
      parts.push_back({const_cast<std::byte*>(device), sources[i].held, sources[i].strides, chunk.part,
                       size_of(tensor.type), place});
    }
    copier_->follow(stream);
  });
  copied_ = false;
  const auto end = [this] {
    copied_ = true;
    copied_.notify_all();
  };
  try {
    saver_.save_in_background(plan, staged, state, [this, end, parts = std::move(parts)] {
      try {
        copier_->fetch(parts);
      } catch (...) {
        end();
        throw;
      }
      end();
    });
  } catch (...) {
    end();
    throw;
  }
  if (!saver_.is_writing()) end();
}

template <host_communicator Comm>
load_result load(device_stream stream, Comm& comm, const std::string& path, std::span<const target_piece> targets,
                 const load_options& options, const device_copy_options& copies) {
  std::unique_ptr<detail::device_copier> copier;
  detail::staging_memory memory;
  std::vector<detail::device_part> parts;
  std::vector<target_piece> staged;
  detail::together(comm, [&] {
    std::int64_t bytes = 0;
    const auto align = [](std::int64_t n) { return (n + 63) / 64 * 64; };
    for (const target_piece& piece : targets) {
      expect_piece(piece);
      TESSERA_EXPECTS(piece.data != nullptr || piece.part.empty(), "tensor '" << piece.name << "' has no data");
      bytes += align(piece.part.volume() * size_of(piece.type));
    }
    memory.reserve(bytes);
    std::byte* place = memory.data();
    for (const target_piece& piece : targets) {
      const std::int64_t width = size_of(piece.type);
      staged.push_back({piece, place});
      if (piece.part.empty()) continue;
      parts.push_back({static_cast<std::byte*>(piece.data), piece.part,
                       detail::strides_or_packed(piece.strides, piece.part), piece.part, width, place});
      place += align(piece.part.volume() * width);
    }
    copier = std::make_unique<detail::device_copier>(copies.pinned_bytes);
  });
  load_result result = load(comm, path, staged, options);
  copier->follow(stream);
  copier->send(parts);
  return result;
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
