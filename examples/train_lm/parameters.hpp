// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The replicated parameters of the model: one flat array, told apart by name.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "random.hpp"

namespace train_lm {

/// One tensor in a flat array.
struct parameter {
  std::string name;         ///< For example "block0.mixer.in".
  std::int64_t offset = 0;  ///< First element in the flat array.
  std::int64_t count = 0;   ///< Elements.
  bool decays = false;      ///< Whether AdamW's weight decay applies: matrices yes, gains and biases no.
};

/// The order and the places of tensors in a flat array.
class parameter_table {
 public:
  /// Appends a tensor. @return its offset.
  std::int64_t add(std::string name, std::int64_t count, bool decays) {
    entries_.push_back({std::move(name), size_, count, decays});
    size_ += count;
    return entries_.back().offset;
  }
  /// Elements of all tensors.
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
  std::int64_t size_ = 0;
};

/// Fills a tensor with normal numbers of the given deviation, keyed by its name.
template <class A>
void fill_normal(std::span<A> values, std::uint64_t seed, const std::string& name, double deviation) {
  const random_stream random(seed, name);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(deviation * random.normal(i));
}

}  // namespace train_lm
