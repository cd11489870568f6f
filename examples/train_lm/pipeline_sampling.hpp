// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Text from a pipelined model: one document, read in pieces, whose logits every rank gets.

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <tessera/core/error.hpp>
#include <tessera/mtp/speculative.hpp>

#include "random.hpp"

namespace train_lm {

/// Reads one document with a `pipeline_model`, collectively, and takes back what a draft got wrong: the recurrent state
/// behind the bytes that are final is kept beside the one behind all bytes.
/// @tparam Model The model. @tparam A Its element. @tparam Comm Its ranks.
template <class Model, class A, class Comm>
class document_reader {
 public:
  /// @param model The model. @param comm Its ranks. @param max_rows Bytes that it reads at a time. All outlive this.
  document_reader(Model& model, Comm& comm, std::int64_t max_rows) : model_(model), comm_(comm), max_rows_(max_rows) {
    settled_.assign(static_cast<std::size_t>(model.state_size(model.brings_document() ? 1 : 0)), A(0));
    ahead_ = settled_;
  }

  /// Logits after each of the last `count` bytes of `tokens`, which alone may change until the next call.
  ts::matrix_view<const A> operator()(std::span<const std::int32_t> tokens, std::int64_t count) {
    const std::size_t final_size = tokens.size() - static_cast<std::size_t>(count);
    // What was read ahead is kept where all of it has become final.
    if (final_size >= size_ + read_.size() &&
        std::equal(read_.begin(), read_.end(), tokens.begin() + static_cast<std::ptrdiff_t>(size_))) {
      settled_.swap(ahead_);
      size_ += read_.size();
    }
    read(tokens.subspan(size_, final_size - size_), settled_);
    size_ = final_size;
    ahead_ = settled_;
    read_.assign(tokens.begin() + static_cast<std::ptrdiff_t>(final_size), tokens.end());
    read(tokens.subspan(final_size), ahead_);
    comm_.broadcast(ts::host_stream{}, logits_.data(), count * vocabulary, model_.speaker());
    return {logits_.data(), count, vocabulary};
  }

  /// The row of the last call's hidden states that belongs to a byte. @param index Of the byte in the document.
  std::int64_t row_of(std::size_t index) const { return static_cast<std::int64_t>(index - size_); }

 private:
  static constexpr std::int64_t vocabulary = 256;

  /// The logits are those of the last piece.
  void read(std::span<const std::int32_t> tokens, std::vector<A>& state) {
    while (!tokens.empty()) {
      const auto length = std::min<std::int64_t>(max_rows_, static_cast<std::int64_t>(tokens.size()));
      bytes_.assign(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(length));
      logits_.resize(static_cast<std::size_t>(length * vocabulary));
      const bool brings = model_.brings_document();
      model_.evaluate(brings ? 1 : 0, length,
                      brings ? std::span<const std::uint8_t>(bytes_) : std::span<const std::uint8_t>(), state.data(),
                      logits_.data());
      tokens = tokens.subspan(static_cast<std::size_t>(length));
    }
  }

  Model& model_;
  Comm& comm_;
  std::int64_t max_rows_;
  std::size_t size_ = 0;            // bytes behind settled_
  std::vector<std::int32_t> read_;  // bytes between settled_ and ahead_
  std::vector<A> settled_, ahead_, logits_;
  std::vector<std::uint8_t> bytes_;
};

}  // namespace train_lm
