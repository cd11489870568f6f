// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Dynamic shared memory of a block, which is a thread. Kernels declare it in their namespace.

#include <tessera/gemm/detail/hopper/ptx.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::symmetric {
thread_local unsigned char shared_bytes[emulated::shared_bytes_of_a_block];
}
TESSERA_NAMESPACE_END
