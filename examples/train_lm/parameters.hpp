// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Groups of parameters: each lies in one flat array while it is in use, its tensors told apart by name.

#include <cstdint>
#include <span>
#include <string>
#include <stdexcept>
#include <utility>
#include <vector>

#include <tessera/core/box.hpp>

#include "random.hpp"

namespace train_lm {

namespace ts = tessera;

/// One tensor in a flat array.
struct parameter {
  std::string name;         ///< For example "block0.mixer.in".
  std::int64_t offset = 0;  ///< First element in the flat array.
  std::int64_t count = 0;   ///< Elements.
  bool decays = false;      ///< Whether AdamW's weight decay applies: matrices yes, gains and biases no.
  ts::box whole{};          ///< The logical tensor: extents for sharding and checkpoints. Experts: of all ranks.
};

/// The order and the places of tensors in a flat array.
class parameter_table {
 public:
  /// @param alignment Elements: tensors start at multiples of it.
  explicit parameter_table(std::int64_t alignment = 1) : alignment_(alignment) {}

  /// Appends a vector. @return its offset.
  std::int64_t add(std::string name, std::int64_t count, bool decays) {
    return add(std::move(name), ts::box::whole({count}), decays);
  }
  /// Appends a tensor. @return its offset.
  std::int64_t add(std::string name, const ts::box& whole, bool decays) {
    return add(std::move(name), whole, whole.volume(), decays);
  }
  /// Appends `count` elements of a tensor, which other ranks hold the rest of. @return their offset.
  std::int64_t add(std::string name, const ts::box& whole, std::int64_t count, bool decays) {
    const std::int64_t offset = (size_ + alignment_ - 1) / alignment_ * alignment_;
    entries_.push_back({std::move(name), offset, count, decays, whole});
    size_ = offset + count;
    return offset;
  }
  /// Elements of all tensors, gaps included.
  std::int64_t size() const { return size_; }
  /// The tensors, in order.
  const std::vector<parameter>& entries() const { return entries_; }
  /// The tensor at `offset`.
  const parameter& at(std::int64_t offset) const {
    for (const parameter& entry : entries_)
      if (entry.offset == offset) return entry;
    throw std::out_of_range("no parameter starts at offset " + std::to_string(offset));
  }

 private:
  std::vector<parameter> entries_;
  std::int64_t alignment_;
  std::int64_t size_ = 0;
};

/// Fills a tensor with normal numbers of the given deviation, keyed by its name.
template <class A>
void fill_normal(std::span<A> values, std::uint64_t seed, const std::string& name, double deviation) {
  const random_stream random(seed, name);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(deviation * random.normal(i));
}

}  // namespace train_lm
