// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The host's side of a launch: tensor maps, the kernel's attributes.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/gemm/detail/hopper/kernel.cuh>
#include <tessera/gemm/hopper_config.hpp>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// `cuTensorMapEncodeTiled`, taken from the driver at run time, so that nothing links with it.
using tensor_map_encoder = decltype(&::cuTensorMapEncodeTiled);

/// A tensor map for boxes of `BoxBytes` x `box_rows` x 1, swizzled by as many bytes.
/// @tparam T bfloat16 or float. @tparam BoxBytes 32, 64 or 128. @param encode The driver's function. @param data
/// Element 0. @param rank 2 or 3. @param shape Extents, the contiguous one first. @param strides Elements between
/// neighbours along the second and third extent. @param box_rows Rows of a box. @param name For messages.
template <int BoxBytes = 128, class T>
CUtensorMap swizzled_map(tensor_map_encoder encode, const T* data, int rank, const std::int64_t (&shape)[3],
                         const std::int64_t (&strides)[2], int box_rows, const char* name) {
  static constexpr bool is_float = std::is_same_v<T, float>;
  cuuint64_t extents[3], bytes[2];
  const cuuint32_t box[3] = {BoxBytes / sizeof(T), static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
  for (int i = 0; i < 3; ++i) extents[i] = static_cast<cuuint64_t>(shape[i] > 0 ? shape[i] : 1);
  for (int i = 0; i < 2; ++i) bytes[i] = static_cast<cuuint64_t>(strides[i]) * sizeof(T);
  CUtensorMap map;
  const CUresult result = encode(&map, is_float ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                 static_cast<cuuint32_t>(rank), const_cast<T*>(data), extents, bytes, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 BoxBytes == 32   ? CU_TENSOR_MAP_SWIZZLE_32B
                                 : BoxBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                  : CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TESSERA_EXPECTS_AS(cuda_error, result == CUDA_SUCCESS,
                     "cuTensorMapEncodeTiled returned " << static_cast<int>(result) << " for " << name << ": extents ["
                                                        << shape[0] << ", " << shape[1] << ", " << shape[2]
                                                        << "], strides [1, " << strides[0] << ", " << strides[1]
                                                        << "] in elements");
  return map;
}

/// The map of an operand: boxes of one chunk. @param encode The driver's function. @param data Element 0. @param rank 2
/// or 3. @param shape Extents. @param strides Elements between neighbours. @param name For messages.
inline CUtensorMap chunk_map(tensor_map_encoder encode, const bfloat16* data, int rank, const std::int64_t (&shape)[3],
                             const std::int64_t (&strides)[2], const char* name) {
  return swizzled_map(encode, data, rank, shape, strides, chunk_rows, name);
}

/// A matrix to write. @param encode The driver's function. @param data Row 0. @param columns,rows Extents. @param
/// row_stride Elements between rows. @param layers,layer_stride How many matrices, and elements between them. @param
/// layer_per_group Whether they are groups. @param name For messages.
template <class T>
output_matrix<T> make_output(tensor_map_encoder encode, T* data, std::int64_t columns, std::int64_t rows,
                             std::int64_t row_stride, std::int64_t layers, std::int64_t layer_stride,
                             bool layer_per_group, const char* name) {
  // a single layer's stride is not used, but it is checked
  const std::int64_t stride = layers > 1 ? layer_stride : row_stride * (rows > 0 ? rows : 1);
  const std::int64_t row_step = row_stride > 0 ? row_stride : columns;
  return {swizzled_map(encode, data, 3, {columns, rows, layers}, {row_step, stride > 0 ? stride : row_step}, 16, name),
          data,
          layers > 1 ? layer_stride : 0,
          row_stride,
          static_cast<int>(columns),
          layer_per_group};
}

/// Enqueues one kernel. @param stream Where. @param kernel The kernel. @param shared_bytes,threads,cluster What it is
/// made for. @param grid Its blocks. @param arguments Where its parameters are.
inline void launch(device_stream stream, const void* kernel, int shared_bytes, int threads, int cluster, int grid,
                   const void* const* arguments) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
             "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2] = {early_start_attribute(), {}};
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = dim3(static_cast<unsigned>(grid));
  launch_config.blockDim = dim3(static_cast<unsigned>(threads));
  launch_config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  launch_config.stream = stream.get();
  launch_config.attrs = attributes;
  launch_config.numAttrs = cluster > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelExC(&launch_config, kernel, const_cast<void**>(arguments)),
             "the launch of multiply_kernel");
}

/// Enqueues one kernel. @param stream Where. @param c Its grid and cluster. @param map_a,map_b Operands. @param p The
/// rest.
template <class Shape, class Epilogue>
void launch(device_stream stream, const gemm::hopper::config& c, const CUtensorMap& map_a, const CUtensorMap& map_b,
            const multiply_params<typename Epilogue::params>& p) {
  const auto kernel = multiply_kernel<Shape, direct_accumulation, Epilogue>;
  const void* const arguments[] = {&map_a, &map_b, &p};
  launch(stream, reinterpret_cast<const void*>(kernel), shared_layout<Shape>::bytes, Shape::threads, Shape::cluster,
         c.grid, arguments);
}

[[noreturn, gnu::noinline, gnu::cold]] inline void throw_no_kernel(const gemm::hopper::config& c) {
  throw invalid_argument("there is no kernel " + gemm::hopper::to_string(c) + " for this product");
}

/// Enqueues the kernel that a configuration names: the three that exist for each product and epilogue, or, where the
/// epilogue takes steps, the cooperative one without a cluster. @tparam PingPong Whether the ping-pong one is among
/// them.
template <product Product, contiguous OrderB, gathered Gathered, class Epilogue, bool PingPong>
void launch_configured(device_stream stream, const gemm::hopper::config& c, const CUtensorMap& map_a,
                       const CUtensorMap& map_b, const multiply_params<typename Epilogue::params>& p) {
  if (c.grid == 0) return;
  using gemm::hopper::schedule;
  bool with_steps = Epilogue::steps == takes_steps::always;
  if constexpr (Epilogue::steps == takes_steps::to_read_old) with_steps = p.epilogue.reads_old;
  if constexpr (PingPong && Epilogue::steps != takes_steps::always) {
    if (!with_steps && c.order == schedule::ping_pong && c.tile_n == 128 && c.cluster == 1)
      return launch<kernel_shape<Product, OrderB, Gathered, 128, 5, 1, true>, Epilogue>(stream, c, map_a, map_b, p);
  }
  if (c.order == schedule::cooperative && c.tile_n == 256 && c.cluster == 1)
    return launch<kernel_shape<Product, OrderB, Gathered, 256, 4, 1, false>, Epilogue>(stream, c, map_a, map_b, p);
  if constexpr (Epilogue::steps != takes_steps::always) {
    if (!with_steps && c.order == schedule::cooperative && c.tile_n == 256 && c.cluster == 2)
      return launch<kernel_shape<Product, OrderB, Gathered, 256, 4, 2, false>, Epilogue>(stream, c, map_a, map_b, p);
  }
  throw_no_kernel(c);
}

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
