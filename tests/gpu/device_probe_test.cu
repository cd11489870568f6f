// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The shared functions give the same bits on the device as on the host: every bfloat16 word widened and rounded back,
// and the words in between. Without a GPU it says so and exits with 77, which CTest reports as skipped.

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/tessera.cuh>

namespace ts = tessera;

namespace {

constexpr int skip_return_code = 77;

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

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

}  // namespace

int main() {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device (%s)\n", found == cudaSuccess ? "none found" : cudaGetErrorString(found));
    return skip_return_code;
  }
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, round_kernel) != cudaSuccess) {
    cudaDeviceProp properties{};
    require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    std::printf("skipped: compiled for other architectures than this device's %d.%d\n", properties.major,
                properties.minor);
    return skip_return_code;
  }

  constexpr std::size_t elements = static_cast<std::size_t>(num_words) * num_probes;
  ts::bfloat16* rounded = nullptr;
  float* widened = nullptr;
  require(cudaMalloc(&rounded, elements * sizeof(ts::bfloat16)), "cudaMalloc");
  require(cudaMalloc(&widened, elements * sizeof(float)), "cudaMalloc");
  round_kernel<<<num_words / 256, 256>>>({rounded, num_words, num_probes}, {widened, num_words, num_probes});
  require(cudaGetLastError(), "round_kernel");

  std::vector<ts::bfloat16> device_rounded(elements);
  std::vector<float> device_widened(elements);
  require(cudaMemcpy(device_rounded.data(), rounded, elements * sizeof(ts::bfloat16), cudaMemcpyDeviceToHost), "copy");
  require(cudaMemcpy(device_widened.data(), widened, elements * sizeof(float), cudaMemcpyDeviceToHost), "copy");
  require(cudaFree(rounded), "cudaFree");
  require(cudaFree(widened), "cudaFree");

  int differences = 0;
  for (int word = 0; word < num_words; ++word) {
    for (int which = 0; which < num_probes; ++which) {
      const std::size_t i = static_cast<std::size_t>(word) * num_probes + static_cast<std::size_t>(which);
      const ts::bfloat16 host(probe(static_cast<std::uint32_t>(word), which));
      const auto host_bits = std::bit_cast<std::uint32_t>(static_cast<float>(host));
      const auto device_bits = std::bit_cast<std::uint32_t>(device_widened[i]);
      if (host.bits != device_rounded[i].bits || host_bits != device_bits) {
        if (++differences <= 5) {
          std::printf("word %04x probe %d: host %04x, device %04x\n", static_cast<unsigned>(word), which,
                      static_cast<unsigned>(host.bits), static_cast<unsigned>(device_rounded[i].bits));
        }
      }
    }
  }
  std::printf("%zu roundings compared, %d differ\n", elements, differences);
  return differences == 0 ? 0 : 1;
}
