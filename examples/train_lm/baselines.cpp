// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#include "baselines.hpp"

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include <tessera/core/error.hpp>

namespace train_lm {
namespace {

/// Number of the context made of the last `order` bytes of `text`.
std::size_t context_index(std::string_view text, int order) {
  std::size_t index = 0;
  for (std::size_t i = text.size() - static_cast<std::size_t>(order); i < text.size(); ++i) {
    index = index * 256 + static_cast<unsigned char>(text[i]);
  }
  return index;
}

/// Size of the compressed file in bytes; 0 if the command failed.
std::size_t compressed_bytes(const std::string& command) {
  std::FILE* pipe = ::popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return 0;
  std::array<char, 1 << 16> buffer;
  std::size_t bytes = 0;
  while (const std::size_t got = std::fread(buffer.data(), 1, buffer.size(), pipe)) bytes += got;
  return ::pclose(pipe) == 0 ? bytes : 0;
}

/// `text` as one word for the shell.
std::string quoted(const std::string& text) {
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return word + "'";
}

}  // namespace

witten_bell::witten_bell(std::string_view training, int order) : order_(order) {
  TESSERA_EXPECTS(order >= 0 && order <= 2, "the order of the model is " << order << ", it must be 0, 1 or 2");
  for (int o = 0; o <= order; ++o) {
    const std::size_t num_contexts = std::size_t{1} << (8 * o);
    auto& counts = counts_[static_cast<std::size_t>(o)];
    auto& contexts = contexts_[static_cast<std::size_t>(o)];
    counts.assign(num_contexts * 256, 0);
    contexts.assign(num_contexts, {});
    for (std::size_t i = static_cast<std::size_t>(o); i < training.size(); ++i) {
      const std::size_t context = context_index(training.substr(0, i), o);
      std::int32_t& count = counts[context * 256 + static_cast<unsigned char>(training[i])];
      ++contexts[context].total;
      contexts[context].kinds += count == 0 ? 1 : 0;
      ++count;
    }
  }
}

double witten_bell::probability(std::string_view context, unsigned char byte) const {
  double p = 1.0 / 256.0;
  for (int o = 0; o <= order_ && static_cast<std::size_t>(o) <= context.size(); ++o) {
    const std::size_t index = context_index(context, o);
    const context_counts& seen = contexts_[static_cast<std::size_t>(o)][index];
    if (seen.total == 0) break;  // a longer context has not been seen either
    const double count = counts_[static_cast<std::size_t>(o)][index * 256 + byte];
    const auto kinds = static_cast<double>(seen.kinds);
    p = (count + kinds * p) / (static_cast<double>(seen.total) + kinds);
  }
  return p;
}

double witten_bell::bits_per_byte(std::string_view text) const {
  double bits = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    bits -= std::log2(probability(text.substr(0, i), static_cast<unsigned char>(text[i])));
  }
  return text.empty() ? 0 : bits / static_cast<double>(text.size());
}

std::optional<compressor_result> compress_validation(std::string_view training, std::string_view validation,
                                                     const std::string& folder) {
  const std::string command = "xz -9e";
  const std::string file = (std::filesystem::path(folder) / "compressor_input.bin").string();
  const auto bytes_of = [&](std::string_view first, std::string_view second) -> std::size_t {
    {
      std::ofstream out(file, std::ios::binary);
      out << first << second;
      if (!out.flush()) return 0;
    }
    return compressed_bytes(command + " --keep --stdout " + quoted(file));
  };
  const std::size_t one = bytes_of(training, {});
  const std::size_t both = one == 0 ? 0 : bytes_of(training, validation);
  std::error_code ignored;
  std::filesystem::remove(file, ignored);
  if (one == 0 || both <= one) return std::nullopt;
  return compressor_result{command, 8.0 * static_cast<double>(both - one) / static_cast<double>(validation.size())};
}

}  // namespace train_lm
