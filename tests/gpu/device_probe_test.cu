// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The shared functions give the same bits on the device as on the host: every bfloat16 word widened and rounded back,
// and the words in between. Without a GPU it says so and exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#undef DOCTEST_CONFIG_IMPLEMENT  // the main function is the last one below

#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/tessera.cuh>

#include "device_fixture.cuh"

namespace ts = tessera;

namespace {

using device_test::buffer;
using device_test::require;

// A float near bfloat16 word `word`: the word itself, and floats below, on and above the tie to the next word.
TESSERA_HD float probe(std::uint32_t word, int which) {
  const std::uint32_t tails[] = {0x0000u, 0x7fffu, 0x8000u, 0x8001u};
  return __builtin_bit_cast(float, (word << 16) | tails[which]);
}

constexpr int num_words = 65536;
constexpr int num_probes = 4;

__global__ void round_kernel(ts::matrix_view<ts::bfloat16> rounded, ts::matrix_view<float> widened) {
  const int word = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (word >= num_words) return;
  for (int which = 0; which < num_probes; ++which) {
    rounded(word, which) = ts::bfloat16(probe(static_cast<std::uint32_t>(word), which));
    widened(word, which) = rounded(word, which);
  }
}

// A reason to skip: the program has no code for this device. "" if it has.
std::string no_code() {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, round_kernel) == cudaSuccess) return "";
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return "compiled for other architectures than this device's " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor);
}

}  // namespace

TEST_CASE("bfloat16 words and floats between them are rounded and widened as on the host") {
  constexpr std::size_t elements = static_cast<std::size_t>(num_words) * num_probes;
  const buffer<ts::bfloat16> rounded(elements);
  const buffer<float> widened(elements);
  round_kernel<<<num_words / 256, 256>>>({rounded.data(), num_words, num_probes},
                                         {widened.data(), num_words, num_probes});
  require(cudaGetLastError(), "round_kernel");
  const auto device_rounded = rounded.get();
  const auto device_widened = widened.get();

  int differences = 0;
  for (int word = 0; word < num_words; ++word) {
    for (int which = 0; which < num_probes; ++which) {
      const std::size_t i = static_cast<std::size_t>(word) * num_probes + static_cast<std::size_t>(which);
      const ts::bfloat16 host(probe(static_cast<std::uint32_t>(word), which));
      const auto host_bits = std::bit_cast<std::uint32_t>(static_cast<float>(host));
      const auto device_bits = std::bit_cast<std::uint32_t>(device_widened[i]);
      if (host.bits == device_rounded[i].bits && host_bits == device_bits) continue;
      if (++differences <= 5) {
        FAIL_CHECK("word " << word << " probe " << which << ": host " << host.bits << ", device "
                           << device_rounded[i].bits);
      }
    }
  }
  CHECK(differences == 0);
}

int main(int argc, char** argv) {
  using device_test::skips;
  if (skips(device_test::no_device()) || skips(no_code())) return device_test::skip_return_code;
  return doctest::Context(argc, argv).run();
}
