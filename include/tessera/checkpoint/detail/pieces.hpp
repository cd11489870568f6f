// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What all ranks hold, from a function or from the ranks themselves.

#include <concepts>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include <tessera/checkpoint/piece.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

using all_pieces = std::vector<std::vector<piece_info>>;

template <class PiecesOf>
all_pieces collect_pieces(int num_ranks, PiecesOf& pieces_of) {
  TESSERA_EXPECTS(num_ranks >= 1, "num_ranks is " << num_ranks << ", it must be at least 1");
  all_pieces all(static_cast<std::size_t>(num_ranks));
  for (int rank = 0; rank < num_ranks; ++rank) {
    const auto& held = pieces_of(rank);
    all[static_cast<std::size_t>(rank)].assign(std::begin(held), std::end(held));  // descriptions, without the data
  }
  return all;
}

/// A byte string that grows.
class packer {
 public:
  void put(std::int64_t number) { bytes_.append(reinterpret_cast<const char*>(&number), sizeof(number)); }
  void put(const std::string& text) {
    put(static_cast<std::int64_t>(text.size()));
    bytes_ += text;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

/// Reads what a packer of another rank of the same program wrote.
class unpacker {
 public:
  unpacker(const char* at, std::int64_t bytes) : at_(at), end_(at + bytes) {}
  bool done() const { return at_ == end_; }
  std::int64_t number() {
    std::int64_t value = 0;
    std::memcpy(&value, at_, sizeof(value));
    at_ += sizeof(value);
    return value;
  }
  std::string text() {
    const std::int64_t length = number();
    const std::string result(at_, static_cast<std::size_t>(length));
    at_ += length;
    return result;
  }

 private:
  const char* at_;
  const char* end_;
};

inline void pack(packer& target, const piece_info& piece) {
  target.put(piece.name);
  target.put(static_cast<std::int64_t>(piece.type));
  target.put(static_cast<std::int64_t>(piece.whole.rank));
  for (int i = 0; i < piece.whole.rank; ++i) {
    target.put(piece.whole.size[i]);
    target.put(piece.part.offset[i]);
    target.put(piece.part.size[i]);
  }
  target.put(piece.placement);
}

inline piece_info unpack_piece(unpacker& source) {
  piece_info piece;
  piece.name = source.text();
  piece.type = static_cast<element_type>(source.number());
  piece.whole.rank = piece.part.rank = static_cast<int>(source.number());
  for (int i = 0; i < piece.whole.rank; ++i) {
    piece.whole.size[i] = source.number();
    piece.part.offset[i] = source.number();
    piece.part.size[i] = source.number();
  }
  piece.placement = source.text();
  return piece;
}

/// All ranks get the bytes of all ranks. Collective.
template <class Comm>
std::vector<std::string> gather_bytes(Comm& comm, const std::string& own) {
  const host_stream stream;
  const auto ranks = static_cast<std::size_t>(comm.size());
  const auto length = static_cast<std::int64_t>(own.size());
  std::vector<std::int64_t> lengths(ranks);
  comm.all_gather(stream, &length, lengths.data(), 1);
  std::vector<std::string> all(ranks);
  std::vector<transfer> sends;
  std::vector<transfer> receives;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    all[rank].resize(static_cast<std::size_t>(lengths[rank]));
    sends.push_back(send_to(static_cast<int>(rank), own.data(), length));
    receives.push_back(receive_from(static_cast<int>(rank), all[rank].data(), lengths[rank]));
  }
  comm.exchange(stream, sends, receives);
  return all;
}

/// Everyone gets the bytes of `root`. Collective.
template <class Comm>
std::string broadcast_bytes(Comm& comm, std::string bytes, int root) {
  auto length = static_cast<std::int64_t>(bytes.size());
  comm.broadcast(host_stream{}, &length, 1, root);
  bytes.resize(static_cast<std::size_t>(length));
  comm.broadcast(host_stream{}, bytes.data(), length, root);
  return bytes;
}

/// What all ranks hold, from what each holds. Collective.
template <class Comm, class Pieces>
all_pieces gather_pieces(Comm& comm, const Pieces& pieces) {
  packer own;
  // a piece that is wrong is told with the tensor's name on all ranks, by whoever checks what was gathered; only its
  // number of dimensions must be right here
  for (const piece_info& piece : pieces) {
    piece_info described = piece;
    if (described.whole.rank != described.part.rank || described.whole.rank < 0 ||
        described.whole.rank > max_box_rank) {
      described.name.clear();
      described.whole = described.part = box{};
    }
    pack(own, described);
  }
  all_pieces all;
  for (const std::string& bytes : gather_bytes(comm, own.bytes())) {
    std::vector<piece_info>& held = all.emplace_back();
    unpacker source(bytes.data(), static_cast<std::int64_t>(bytes.size()));
    while (!source.done()) held.push_back(unpack_piece(source));
  }
  return all;
}

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
