// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// parity_driver FILE: reads a problem with losses and gradients that PyTorch has computed (parity.py writes it), runs
// the chain, and prints the largest difference relative to the largest value, over losses and over each gradient. Exit
// status 1 if one exceeds 1e-11.

#include <cstdio>
#include <fstream>
#include <string>

#include <tessera/core/error.hpp>

#include "chain_case.hpp"

namespace {

using namespace mtp_test;

template <class T>
std::vector<T> read(std::ifstream& file, std::size_t count) {
  std::vector<T> values(count);
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(T)));
  TESSERA_EXPECTS(file, "the file ends too soon");
  return values;
}

bool compare(const char* name, const std::vector<double>& got, const std::vector<double>& expected) {
  double difference = 0, largest = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    difference = std::max(difference, std::abs(got[i] - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  const bool good = got.size() == expected.size() && largest > 0 && difference <= 1e-11 * largest;
  std::printf("%-16s %zu values, largest %.3g, difference %.3g%s\n", name, expected.size(), largest, difference,
              good ? "" : "  <-- too large");
  return good;
}

template <class Concat>
bool run(const problem& p, const std::vector<double>& factors, const std::vector<double>& losses,
         const std::vector<double>& gradients, const std::vector<double>& hidden_gradient) {
  library_model<ts::precision::fp64, Concat> model(p);
  model.forward(p);
  model.backward(p, factors);
  const auto sums = model.summed_gradients(p.output_norm);
  const auto part = [](const std::vector<double>& from, std::int64_t first, std::int64_t count) {
    const auto at = from.begin() + static_cast<std::ptrdiff_t>(first);
    return std::vector<double>(at, at + static_cast<std::ptrdiff_t>(count));
  };
  bool good = compare("losses", model.depth_losses(), losses);
  good = compare("hidden", model.hidden_gradient, hidden_gradient) && good;
  const std::int64_t table = p.map.vocabulary * p.map.d;
  good = compare("embedding", part(sums, 0, table), part(gradients, 0, table)) && good;
  good = compare("head", part(sums, table, table), part(gradients, table, table)) && good;
  for (int k = 1; k <= p.map.depths; ++k)
    good = compare(("depth " + std::to_string(k)).c_str(), part(sums, p.map.at(k), p.map.depth_size()),
                   part(gradients, p.map.at(k), p.map.depth_size())) &&
           good;
  return good;
}

}  // namespace

int main(int argc, char** argv) try {
  TESSERA_EXPECTS(argc == 2, "usage: parity_driver FILE");
  std::ifstream file(argv[1], std::ios::binary);
  TESSERA_EXPECTS(file, "cannot read " << argv[1]);
  const auto sizes = read<std::int32_t>(file, 6);  // depths, d, vocabulary, rows, sequences, embedding first
  problem p;
  p.map = {sizes[1], sizes[2], sizes[0]};
  p.embedding_first = sizes[5] != 0;
  const auto rows = static_cast<std::size_t>(sizes[3]), elements = rows * static_cast<std::size_t>(sizes[1]);
  p.token_ids = read<std::int32_t>(file, rows);
  p.targets = read<std::int32_t>(file, rows);
  p.positions = read<std::int32_t>(file, rows);
  p.sequence_offsets = read<std::int32_t>(file, static_cast<std::size_t>(sizes[4]) + 1);
  p.parameters = read<double>(file, static_cast<std::size_t>(p.map.size()));
  p.hidden = read<double>(file, elements);
  const auto factors = read<double>(file, static_cast<std::size_t>(p.map.depths));
  const auto losses = read<double>(file, factors.size());
  const auto gradients = read<double>(file, p.parameters.size());
  const auto hidden_gradient = read<double>(file, elements);
  const bool good = p.embedding_first
                        ? run<mtp::concat::embedding_first>(p, factors, losses, gradients, hidden_gradient)
                        : run<mtp::concat::hidden_first>(p, factors, losses, gradients, hidden_gradient);
  return good ? 0 : 1;
} catch (const std::exception& e) {
  std::fprintf(stderr, "parity_driver: %s\n", e.what());
  return 1;
}
