// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of load.hpp.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <tessera/checkpoint/detail/agree.hpp>
#include <tessera/checkpoint/detail/box_copy.hpp>
#include <tessera/checkpoint/detail/checksum.hpp>
#include <tessera/checkpoint/detail/files.hpp>
#include <tessera/checkpoint/detail/parallel.hpp>
#include <tessera/checkpoint/detail/pieces.hpp>
#include <tessera/checkpoint/detail/staging.hpp>
#include <tessera/checkpoint/load.hpp>
#include <tessera/checkpoint/safetensors.hpp>
#include <tessera/core/nvtx.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

namespace detail {

/// A file of a checkpoint, opened and compared with what the manifest says of it.
class checked_file {
 public:
  checked_file(const manifest& content, std::int32_t index, const std::string& folder, const io_observer& observer)
      : source_(file::open(join(folder, listed(content, index).name))) {
    const manifest_file& expected = listed(content, index);
    const std::int64_t bytes = source_.size();
    TESSERA_EXPECTS_AS(checkpoint_error, bytes == expected.bytes,
                       source_.path() << ": it has " << bytes << " bytes, the manifest says " << expected.bytes
                                      << (bytes < expected.bytes ? ": the file is truncated" : ""));
    TESSERA_EXPECTS_AS(checkpoint_error, expected.header_bytes <= max_safetensors_header_bytes + 8,
                       source_.path() << ": its header would have " << expected.header_bytes << " bytes");
    std::string start(static_cast<std::size_t>(expected.header_bytes), '\0');
    source_.read(start.data(), expected.header_bytes, 0, observer);
    header_ = parse_safetensors_header(start, bytes, source_.path());
    TESSERA_EXPECTS_AS(checkpoint_error, header_.data_begin == expected.header_bytes,
                       source_.path() << ": its header ends at byte " << header_.data_begin << ", the manifest says "
                                      << expected.header_bytes);
    // after the entries, so that a wrong one is called by its name
    is_damaged_ = expected.header_checksum != 0 && checksum_of(start) != expected.header_checksum;
  }

  /// Compares a chunk with the file's own header.
  void expect_chunk(const manifest_tensor& tensor, const manifest_chunk& chunk) const {
    const safetensors_entry* entry = header_.find(chunk.entry);
    TESSERA_EXPECTS_AS(checkpoint_error, entry != nullptr,
                       source_.path() << ": tensor '" << tensor.name << "' should be here as '" << chunk.entry
                                      << "', which is not in the header");
    TESSERA_EXPECTS_AS(checkpoint_error, entry->type == tensor.type,
                       source_.path() << ": tensor '" << tensor.name << "' has elements " << name_of(entry->type)
                                      << ", the manifest says " << name_of(tensor.type));
    const std::int64_t begin = chunk.begin - header_.data_begin;
    const std::int64_t end = begin + chunk.part.volume() * size_of(tensor.type);
    TESSERA_EXPECTS_AS(checkpoint_error, entry->begin == begin && entry->end == end,
                       source_.path() << ": tensor '" << tensor.name << "' is at bytes [" << entry->begin << ", "
                                      << entry->end << ") of the data, the manifest says [" << begin << ", " << end
                                      << ")");
    std::vector<std::int64_t> here;
    std::vector<std::int64_t> expected;
    for (const std::int64_t extent : entry->shape) {
      if (extent != 1) here.push_back(extent);
    }
    for (int i = 0; i < chunk.part.rank; ++i) {
      if (chunk.part.size[i] != 1) expected.push_back(chunk.part.size[i]);
    }
    TESSERA_EXPECTS_AS(checkpoint_error, here == expected,
                       source_.path() << ": tensor '" << tensor.name << "' has other extents than the manifest's "
                                      << text_of(chunk.part));
  }

  void expect_undamaged() const {
    TESSERA_EXPECTS_AS(checkpoint_error, !is_damaged_, source_.path() << ": the checksum of its header is wrong");
  }

  const file& source() const { return source_; }

 private:
  static const manifest_file& listed(const manifest& content, std::int32_t index) {
    return content.files[static_cast<std::size_t>(index)];
  }

  file source_;
  safetensors_header header_;
  bool is_damaged_ = false;
};

/// The blocks that one rank reads, in its own memory.
class staged_units {
 public:
  /// Reads and compares.
  void read(const manifest& content, const read_plan& plan, int rank, const std::string& folder,
            const load_options& options) {
    offset_.assign(plan.units.size(), -1);
    std::vector<std::size_t> own;
    for (std::size_t i = 0; i < plan.units.size(); ++i) {
      if (plan.units[i].reader == rank) own.push_back(i);
    }
    const auto file_of = [&](std::size_t i) { return chunk_of(content, plan.units[i]).file; };
    std::sort(own.begin(), own.end(), [&](std::size_t a, std::size_t b) {
      return std::pair(file_of(a), plan.units[a].begin) < std::pair(file_of(b), plan.units[b].begin);
    });
    bytes_ = plan.bytes[static_cast<std::size_t>(rank)];
    data_.reserve(bytes_);

    // neighbours in a file are one access, not so large that it leaves the caches before its checksum is computed
    constexpr std::int64_t most = std::int64_t{4} << 20;
    std::vector<access> accesses;
    std::int64_t place = 0;
    for (std::size_t i = 0; i < own.size(); ++i) {
      const read_unit& unit = plan.units[own[i]];
      const bool joins = !accesses.empty() && file_of(own[i - 1]) == file_of(own[i]) &&
                         unit.begin == accesses.back().begin + accesses.back().bytes &&
                         accesses.back().bytes + unit.bytes <= most;
      if (!joins) accesses.push_back({i, i, unit.begin, 0, place});
      accesses.back().end = i + 1;
      accesses.back().bytes += unit.bytes;
      offset_[own[i]] = place;
      place += unit.bytes;
    }
    for (std::size_t first = 0, end = 0; first < accesses.size(); first = end) {
      const std::int32_t index = file_of(own[accesses[first].first]);
      while (end < accesses.size() && file_of(own[accesses[end].first]) == index) ++end;
      const checked_file open(content, index, folder, options.observer);
      expect_chunks(content, plan, own, accesses[first].first, open);
      read_file(content, plan, own, std::span(accesses).subspan(first, end - first), open.source(), options);
    }
  }

  const std::byte* of(std::size_t unit) const { return data_.data() + offset_[unit]; }
  std::int64_t bytes() const { return bytes_; }

 private:
  struct access {
    std::size_t first;  // indices into the units that this rank reads
    std::size_t end;
    std::int64_t begin;  // in the file
    std::int64_t bytes;
    std::int64_t place;  // here
  };

  // All accesses to one file. The threads take them in turn: while one waits for the disk, or for the memory that it
  // touches for the first time, another compares.
  void read_file(const manifest& content, const read_plan& plan, const std::vector<std::size_t>& own,
                 std::span<const access> accesses, const file& source, const load_options& options) {
    std::mutex mutex;
    std::size_t asked = 0;  // the system knows of the accesses before
    io_observer one_at_a_time;
    if (options.observer) {
      one_at_a_time = [&](const io_event& event) {
        const std::lock_guard lock(mutex);
        options.observer(event);
      };
    }
    in_parallel(accesses.size(), options.num_threads, [&](std::size_t a) {
      const access& next = accesses[a];
      {
        const std::lock_guard lock(mutex);
        constexpr std::int64_t ahead = std::int64_t{32} << 20;
        for (; asked < accesses.size() && accesses[asked].place < next.place + ahead; ++asked) {
          source.start_reading(accesses[asked].begin, accesses[asked].bytes);
        }
      }
      source.read(data_.data() + next.place, next.bytes, next.begin, one_at_a_time);
      for (std::size_t i = next.first; i < next.end; ++i) {
        compare(content, plan.units[own[i]], offset_[own[i]], source.path());
      }
    });
  }

  static const manifest_chunk& chunk_of(const manifest& content, const read_unit& unit) {
    return content.tensors[static_cast<std::size_t>(unit.tensor)].chunks[static_cast<std::size_t>(unit.chunk)];
  }

  // All chunks of the file that `own[first]` is in.
  static void expect_chunks(const manifest& content, const read_plan& plan, const std::vector<std::size_t>& own,
                            std::size_t first, const checked_file& open) {
    const std::int32_t index = chunk_of(content, plan.units[own[first]]).file;
    const manifest_chunk* previous = nullptr;
    for (std::size_t i = first; i < own.size(); ++i) {
      const manifest_chunk& chunk = chunk_of(content, plan.units[own[i]]);
      if (chunk.file != index) break;
      if (&chunk == previous) continue;
      previous = &chunk;
      open.expect_chunk(content.tensors[static_cast<std::size_t>(plan.units[own[i]].tensor)], chunk);
    }
    open.expect_undamaged();
  }

  void compare(const manifest& content, const read_unit& unit, std::int64_t offset, const std::string& path) const {
    const manifest_chunk& chunk = chunk_of(content, unit);
    if (chunk.checksums.empty()) return;  // a file of others
    TESSERA_EXPECTS_AS(
        checkpoint_error,
        checksum_of(data_.data() + offset, unit.bytes) == chunk.checksums[static_cast<std::size_t>(unit.block)],
        path << ": the checksum of " << text_of(unit.part) << " of tensor '"
             << content.tensors[static_cast<std::size_t>(unit.tensor)].name << "' (bytes [" << unit.begin << ", "
             << unit.begin + unit.bytes << ") of the file) is wrong: the file is damaged");
  }

  staging_memory data_;
  std::int64_t bytes_ = 0;
  std::vector<std::int64_t> offset_;  // of each unit of the plan; -1: read by another rank
};

/// The blocks that this rank reads or wants, by round: rounds bound the memory in flight. The round of a block follows
/// from the bytes that its reader has before it, so all ranks know it.
inline std::vector<std::vector<std::size_t>> rounds_of(const read_plan& plan, int rank, std::int64_t num_ranks,
                                                       std::int64_t block_bytes) {
  const std::int64_t most = std::max((std::int64_t{256} << 20) / num_ranks, block_bytes);
  std::vector<std::int64_t> sent(static_cast<std::size_t>(num_ranks));
  std::vector<std::vector<std::size_t>> rounds;
  std::int64_t count = 0;
  for (std::size_t i = 0; i < plan.units.size(); ++i) {
    const read_unit& unit = plan.units[i];
    std::int64_t& before = sent[static_cast<std::size_t>(unit.reader)];
    const std::int64_t round = before / most;
    before += unit.bytes;
    count = std::max(count, round + 1);
    bool is_mine = unit.reader == rank;
    for (std::int64_t n = 0; n < unit.num_needs && !is_mine; ++n) {
      const auto target = static_cast<std::size_t>(plan.needs[static_cast<std::size_t>(unit.first_need + n)]);
      const std::vector<read_holder>& holders = plan.targets[target].holders;
      const auto place = std::lower_bound(holders.begin(), holders.end(), rank,
                                          [](const read_holder& h, int r) { return h.rank < r; });
      is_mine = place != holders.end() && place->rank == rank;
    }
    if (!is_mine) continue;
    if (static_cast<std::int64_t>(rounds.size()) <= round) rounds.resize(static_cast<std::size_t>(round + 1));
    rounds[static_cast<std::size_t>(round)].push_back(i);
  }
  rounds.resize(static_cast<std::size_t>(count));
  return rounds;
}

/// A part that goes from an array of `held` to a piece.
struct incoming_part {
  const target_piece* piece;
  box part;
  const std::byte* data;
  box held;
};

inline void place_all(const std::vector<incoming_part>& all, int num_threads) {
  in_parallel(all.size(), num_threads, [&](std::size_t i) {
    const incoming_part& in = all[i];
    copy_box(in.part, in.data, in.held, packed_strides(in.held), in.piece->data, in.piece->part,
             strides_or_packed(in.piece->strides, in.piece->part), size_of(in.piece->type));
  });
}

/// What one rank sends, receives and places in a round.
class round_messages {
 public:
  round_messages(const manifest& content, const read_plan& plan, const staged_units& staged,
                 std::span<const target_piece> pieces, int rank)
      : content_(content), plan_(plan), staged_(staged), pieces_(pieces), rank_(rank) {}

  void clear() {
    sends.clear();
    receives.clear();
    own.clear();
    arrivals.clear();
    packed_.clear();
  }

  /// Adds block `i`.
  void add(std::size_t i) {
    const read_unit& unit = plan_.units[i];
    const std::int64_t width = size_of(content_.tensors[static_cast<std::size_t>(unit.tensor)].type);
    for (std::int64_t n = 0; n < unit.num_needs; ++n) {
      const read_target& target =
          plan_.targets[static_cast<std::size_t>(plan_.needs[static_cast<std::size_t>(unit.first_need + n)])];
      const box part = intersect(unit.part, target.part);
      const std::byte* outgoing = nullptr;
      for (const read_holder& holder : target.holders) {
        if (holder.rank != rank_) {
          if (unit.reader != rank_) continue;
          if (outgoing == nullptr) outgoing = outgoing_part(i, part, width);
          sends.push_back(send_to(holder.rank, outgoing, part.volume() * width));
        } else if (unit.reader == rank_) {
          own.push_back({&piece_of(holder), part, staged_.of(i), unit.part});
        } else {
          receive(unit.reader, piece_of(holder), part, width);
        }
      }
    }
  }

  std::vector<transfer> sends;
  std::vector<transfer> receives;
  std::vector<incoming_part> own;
  std::vector<incoming_part> arrivals;  // what is not contiguous where it goes

 private:
  const target_piece& piece_of(const read_holder& holder) const {
    return pieces_[static_cast<std::size_t>(holder.piece)];
  }

  std::byte* pack(std::int64_t bytes) {
    return packed_.emplace_back(std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(bytes))).get();
  }

  // A part of block `i` in one piece.
  const std::byte* outgoing_part(std::size_t i, const box& part, std::int64_t width) {
    const box& held = plan_.units[i].part;
    const stride_array strides = packed_strides(held);
    if (is_contiguous(part, strides)) return staged_.of(i) + offset_in(held, strides, part) * width;
    std::byte* const buffer = pack(part.volume() * width);
    copy_box(part, staged_.of(i), held, strides, buffer, part, packed_strides(part), width);
    return buffer;
  }

  void receive(int from, const target_piece& piece, const box& part, std::int64_t width) {
    const std::int64_t bytes = part.volume() * width;
    const stride_array strides = strides_or_packed(piece.strides, piece.part);
    if (is_contiguous(part, strides)) {
      std::byte* place = static_cast<std::byte*>(piece.data) + offset_in(piece.part, strides, part) * width;
      receives.push_back(receive_from(from, place, bytes));
    } else {
      std::byte* const buffer = pack(bytes);
      receives.push_back(receive_from(from, buffer, bytes));
      arrivals.push_back({&piece, part, buffer, part});
    }
  }

  const manifest& content_;
  const read_plan& plan_;
  const staged_units& staged_;
  std::span<const target_piece> pieces_;
  int rank_;
  std::vector<std::unique_ptr<std::byte[]>> packed_;
};

/// Brings what was read to those who want it. Collective.
template <class Comm>
void distribute(Comm& comm, const manifest& content, const read_plan& plan, const staged_units& staged,
                std::span<const target_piece> pieces, int num_threads) {
  round_messages messages(content, plan, staged, pieces, comm.rank());
  for (const std::vector<std::size_t>& units : rounds_of(plan, comm.rank(), comm.size(), content.block_bytes)) {
    messages.clear();
    for (const std::size_t i : units) messages.add(i);
    place_all(messages.own, num_threads);
    comm.exchange(host_stream{}, messages.sends, messages.receives);
    place_all(messages.arrivals, num_threads);
  }
}

}  // namespace detail

template <host_communicator Comm>
load_result load(Comm& comm, const std::string& path, const manifest& content, std::span<const target_piece> targets,
                 const load_options& options) {
  [[maybe_unused]] const nvtx_range range("tessera::checkpoint::load");
  detail::together(comm, [&] {
    TESSERA_EXPECTS(options.num_threads >= 1, "num_threads is " << options.num_threads << ", it must be at least 1");
    for (const target_piece& piece : targets) {
      expect_piece(piece);
      TESSERA_EXPECTS(piece.data != nullptr || piece.part.empty(), "tensor '" << piece.name << "' has no data");
    }
  });
  const read_plan plan = plan_reads(content, detail::gather_pieces(comm, targets), path);
  detail::staged_units staged;
  detail::together(comm, [&] { staged.read(content, plan, comm.rank(), path, options); });
  detail::distribute(comm, content, plan, staged, targets, options.num_threads);
  if (comm.rank() == 0) options.log(log_level::info, "loaded ", path);
  return {content.state, path, staged.bytes()};
}

template <host_communicator Comm>
load_result load(Comm& comm, const std::string& path, std::span<const target_piece> targets,
                 const load_options& options) {
  std::string text;
  const std::string name = detail::join(path, manifest_name);
  detail::together(comm, [&] {
    if (comm.rank() != 0) return;
    read_manifest(path, options.observer);
    text = detail::read_text(name, max_manifest_bytes, options.observer);
  });
  text = detail::broadcast_bytes(comm, std::move(text), 0);
  return load(comm, path, parse_manifest(text, name), targets, options);
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
