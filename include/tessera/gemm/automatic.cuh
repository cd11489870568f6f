// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of the choice of a backend: `hopper` where the device has its instructions and the program code for
/// them, `portable` on everything else of compute capability 8.0 and later.

#include <type_traits>

#include <tessera/core/stream.hpp>
#include <tessera/gemm/automatic.hpp>
#include <tessera/gemm/hopper.cuh>
#include <tessera/gemm/portable.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr int probe_threads = 64;
#else
inline constexpr int probe_threads = 32;
#endif

// Its launch bound tells the host what the code in use was compiled for: `-arch=sm_90`, which `native` also means, has
// no matrix instructions of warpgroups. It is never launched.
template <class Program>
__global__ void __launch_bounds__(probe_threads) architecture_probe_kernel() {}

/// Whether this program has code for the warpgroup instructions that the current device would run.
inline bool has_warpgroup_code() {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, architecture_probe_kernel<void>), "cudaFuncGetAttributes");
  return attributes.maxThreadsPerBlock == 64;
}

/// Whether the current device has compute capability 9.0 and this program code for its own instructions.
[[gnu::noinline]] inline bool has_hopper() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0 && has_warpgroup_code();
}

/// The products of the backend that the policy `Gemm` stands for on the calling thread's current device. Arguments are
/// those of the functions in `gemm::hopper` and `gemm::portable`, without the device and the options of a launch.
template <class Gemm>
class device_products {
  static_assert(gemm::device_policy<Gemm>,
                "the device half needs a backend for device memory: gemm::automatic, gemm::hopper::backend or "
                "gemm::portable::backend");

 public:
  /// @param tile_counter For `gemm::hopper`: see its `launch_options`; may be null.
  /// @throws invalid_argument if the device cannot run the backend. @throws cuda_error if the runtime fails.
  explicit device_products(std::int32_t* tile_counter) {
    if constexpr (std::is_same_v<Gemm, gemm::automatic>) on_hopper_ = has_hopper();
    if (on_hopper_)
      (hopper_ = gemm::hopper::device::current()).tile_counter = tile_counter;
    else
      portable_ = {gemm::portable::device::current()};
  }

  /// The same products by launches that keep to `sm_budget` multiprocessors, and leave what they leave to other
  /// streams. @param sm_budget 0: all, and what becomes free is for this stream's next kernels.
  device_products limited(int sm_budget) const {
    device_products result = *this;
    result.hopper_.leaves_room = sm_budget > 0;
    for (int* const sms : {&result.hopper_.num_multiprocessors, &result.portable_.num_multiprocessors})
      if (sm_budget > 0 && sm_budget < *sms) *sms = sm_budget;
    return result;
  }
  /// The same products by launches beside which other streams' kernels come and go. @param shares Whether they do.
  device_products beside(bool shares) const {
    device_products result = *this;
    result.hopper_.shared = shares;
    return result;
  }

  /// `variable_m`.
  template <hopper::contiguous Order, hopper::gathered Rows, class TC, class... Arguments>
  void variable_m(device_stream stream, const Arguments&... arguments) const {
    if constexpr (may_be_hopper)
      if (on_hopper_) return gemm::hopper::variable_m<Order, Rows, TC>(stream, hopper_, arguments...);
    if constexpr (may_be_portable) gemm::portable::variable_m<Order, Rows, TC>(stream, portable_, arguments...);
  }
  /// `variable_m_activation`.
  template <hopper::contiguous Order, hopper::gathered Rows, class Activation, bool Interleaved, class... Arguments>
  void variable_m_activation(device_stream stream, const Arguments&... arguments) const {
    if constexpr (may_be_hopper)
      if (on_hopper_)
        return gemm::hopper::variable_m_activation<Order, Rows, Activation, Interleaved>(stream, hopper_, arguments...);
    if constexpr (may_be_portable)
      gemm::portable::variable_m_activation<Order, Rows, Activation, Interleaved>(stream, portable_, arguments...);
  }
  /// `variable_m_activation_backward`.
  template <hopper::contiguous Order, hopper::gathered Rows, class Activation, bool Interleaved, class... Arguments>
  void variable_m_activation_backward(device_stream stream, const Arguments&... arguments) const {
    if constexpr (may_be_hopper)
      if (on_hopper_)
        return gemm::hopper::variable_m_activation_backward<Order, Rows, Activation, Interleaved>(stream, hopper_,
                                                                                                  arguments...);
    if constexpr (may_be_portable)
      gemm::portable::variable_m_activation_backward<Order, Rows, Activation, Interleaved>(stream, portable_,
                                                                                           arguments...);
  }
  /// `variable_k`.
  template <hopper::gathered Rows, class TC, class... Arguments>
  void variable_k(device_stream stream, const Arguments&... arguments) const {
    if constexpr (may_be_hopper)
      if (on_hopper_) return gemm::hopper::variable_k<Rows, TC>(stream, hopper_, arguments...);
    if constexpr (may_be_portable) gemm::portable::variable_k<Rows, TC>(stream, portable_, arguments...);
  }

 private:
  static constexpr bool may_be_hopper = !std::is_same_v<Gemm, gemm::portable::backend>;
  static constexpr bool may_be_portable = !std::is_same_v<Gemm, gemm::hopper::backend>;

  bool on_hopper_ = may_be_hopper;
  gemm::hopper::device hopper_;
  // where code for sm_90a has Hopper's products, it does without these
  struct portable_device : gemm::portable::device {
    static constexpr bool beside_hopper = !may_be_hopper;
  };
  portable_device portable_;
};

}  // namespace detail

TESSERA_NAMESPACE_END
