// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A small model whose elements are a function of their place, on ranks in any split of expert and data parallelism, and
// folders that vanish.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <tessera/checkpoint/checkpoint.hpp>

#include "../support/messages.hpp"

namespace tessera_test {

namespace ts = tessera;
namespace ck = tessera::checkpoint;
namespace fs = std::filesystem;

// A new folder, deleted with everything in it.
class temporary_folder {
 public:
  temporary_folder() {
    std::random_device device;
    path_ = fs::temp_directory_path() / ("tessera-" + std::to_string(device()) + "-" + std::to_string(device()));
    fs::create_directories(path_);
  }
  temporary_folder(const temporary_folder&) = delete;
  temporary_folder& operator=(const temporary_folder&) = delete;
  ~temporary_folder() {
    std::error_code code;
    fs::remove_all(path_, code);
  }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string str() const { return path_.string(); }

 private:
  fs::path path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
}

// Row-major number of an element of the whole tensor.
inline std::int64_t flat_index(const ts::box& whole, const std::int64_t* index) {
  std::int64_t flat = 0;
  for (int i = 0; i < whole.rank; ++i) flat = flat * whole.size[i] + index[i];
  return flat;
}

// The bits of an element: a mix of the tensor's name, the element's number and a version. NaNs are among them.
inline std::uint64_t bits_of(const std::string& name, std::int64_t flat, std::uint64_t version) {
  std::uint64_t x = std::hash<std::string>()(name) ^ (static_cast<std::uint64_t>(flat) * 0x9e3779b97f4a7c15u) ^
                    (version * 0xbf58476d1ce4e5b9u);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Calls visit(position in a packed array of the part, number in the whole) for all elements of a part.
template <class Visit>
void for_each_element(const ts::box& whole, const ts::box& part, Visit&& visit) {
  for (std::int64_t i = 0; i < part.volume(); ++i) {
    std::int64_t index[ts::max_box_rank] = {};
    std::int64_t rest = i;
    for (int d = part.rank - 1; d >= 0; --d) {
      index[d] = part.offset[d] + rest % part.size[d];
      rest /= part.size[d];
    }
    visit(i, flat_index(whole, index));
  }
}

// Part `index` of `count` along a dimension, as torch.chunk cuts it: the last ones may be shorter, or empty.
inline ts::box chunk_of(ts::box part, int dimension, int index, int count) {
  const std::int64_t extent = part.size[dimension];
  const std::int64_t step = (extent + count - 1) / count;
  const std::int64_t begin = std::min(extent, step * index);
  part.offset[dimension] += begin;
  part.size[dimension] = std::min(step, extent - begin);
  return part;
}

// The parts of all tensors that one of `num_ranks` ranks holds, `ep` of them next to each other sharing the experts.
inline std::vector<ck::piece_info> model_pieces(int rank, int num_ranks, int ep) {
  using ck::element_type;
  const int ep_rank = rank % ep;
  const int dp_rank = rank / ep;
  const int dp = num_ranks / ep;
  std::vector<ck::piece_info> pieces;
  const auto add = [&](const char* name, element_type type, const ts::box& whole, const ts::box& part) {
    pieces.push_back({name, type, whole, part, "ep " + std::to_string(ep)});
  };
  const ts::box up = ts::box::whole({12, 6, 40});
  const ts::box mine = chunk_of(chunk_of(up, 0, ep_rank, ep), 1, dp_rank, dp);
  add("experts.up", element_type::bf16, up, mine);
  add("experts.up.exp_avg", element_type::f32, up, mine);
  const ts::box down = ts::box::whole({12, 10, 6});  // replicated over data parallelism
  add("experts.down", element_type::bf16, down, chunk_of(down, 0, ep_rank, ep));
  const ts::box dense = ts::box::whole({13, 5});
  add("embedding", element_type::f32, dense, chunk_of(dense, 0, rank, num_ranks));
  const ts::box wide = ts::box::whole({64, 96});  // several blocks, and rows in pieces
  add("wide", element_type::f32, wide, chunk_of(wide, 1, rank, num_ranks));
  const ts::box gate = ts::box::whole({12, 40});
  add("gate", element_type::f64, gate, gate);
  add("bytes", element_type::u8, ts::box::whole({3}), ts::box::whole({3}));
  add("step", element_type::i64, ts::box{}, ts::box{});
  add("nothing", element_type::f32, ts::box::whole({4, 0}), ts::box::whole({4, 0}));
  return pieces;
}

// The model's tensors with their memory.
class model_rank {
 public:
  // Elements of version `version`, or a fixed pattern where it is 0.
  model_rank(int rank, int num_ranks, int ep, std::uint64_t version)
      : model_rank(model_pieces(rank, num_ranks, ep), version) {}

  model_rank(std::vector<ck::piece_info> pieces, std::uint64_t version) {
    for (ck::piece_info& piece : pieces) {
      const std::int64_t width = size_of(piece.type);
      memory_.emplace_back(static_cast<std::size_t>(piece.part.volume() * width), untouched);
      targets_.push_back({std::move(piece), memory_.back().data()});
    }
    if (version != 0) fill(version);
  }

  void fill(std::uint64_t version) {
    for (std::size_t i = 0; i < targets_.size(); ++i) {
      const ck::piece_info& piece = targets_[i];
      const std::int64_t width = size_of(piece.type);
      for_each_element(piece.whole, piece.part, [&](std::int64_t position, std::int64_t flat) {
        const std::uint64_t bits = bits_of(piece.name, flat, version);
        std::memcpy(memory_[i].data() + position * width, &bits, static_cast<std::size_t>(width));
      });
    }
  }

  // Number of elements that are not those of a version.
  std::int64_t differences(std::uint64_t version) const {
    std::int64_t count = 0;
    for (std::size_t i = 0; i < targets_.size(); ++i) {
      const ck::piece_info& piece = targets_[i];
      const std::int64_t width = size_of(piece.type);
      for_each_element(piece.whole, piece.part, [&](std::int64_t position, std::int64_t flat) {
        const std::uint64_t bits = bits_of(piece.name, flat, version);
        const char* element = memory_[i].data() + position * width;
        if (std::memcmp(element, &bits, static_cast<std::size_t>(width)) != 0) ++count;
      });
    }
    return count;
  }

  bool is_untouched() const {
    for (const auto& memory : memory_) {
      if (!std::all_of(memory.begin(), memory.end(), [](char c) { return c == untouched; })) return false;
    }
    return true;
  }

  std::vector<ck::target_piece>& targets() { return targets_; }
  std::vector<ck::source_piece> sources() const { return {targets_.begin(), targets_.end()}; }

 private:
  static constexpr char untouched = 0x5a;
  std::vector<std::vector<char>> memory_;
  std::vector<ck::target_piece> targets_;
};

// Bytes of all elements of the model, each counted once.
inline std::int64_t model_bytes() {
  std::int64_t bytes = 0;
  for (const ck::piece_info& piece : model_pieces(0, 1, 1)) bytes += piece.whole.volume() * size_of(piece.type);
  return bytes;
}

inline ck::save_plan model_plan(int num_ranks, int ep) {
  return ck::make_plan(num_ranks, [&](int rank) { return model_pieces(rank, num_ranks, ep); },
                       {.split_bytes = 2000, .block_bytes = 4096});
}

}  // namespace tessera_test
