// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A user's program that asks for the optional parts which its CMakeLists.txt found.

#include <cstdio>

#include <tessera/tessera.hpp>

#if defined(CONSUMER_HAS_MPI)
#include <tessera/comm/mpi.hpp>
#endif
#if defined(CONSUMER_HAS_CBLAS)
#include <tessera/gemm/blas.hpp>
#endif
#if defined(CONSUMER_HAS_NCCL)
#include <nccl.h>
#endif
#if defined(CONSUMER_HAS_CHECKPOINT)
#include <tessera/checkpoint/checkpoint.hpp>
#endif

int main() {
#if defined(CONSUMER_HAS_MPI)
  static_assert(tessera::communicator<tessera::comm::mpi>);
  int flag = 0;
  MPI_Initialized(&flag);  // resolves only if the library is linked
  if (flag != 0) return 1;
  std::puts("mpi");
#endif
#if defined(CONSUMER_HAS_CBLAS)
  const double x[] = {1.0, 2.0};
  if (cblas_ddot(2, x, 1, x, 1) != 5.0) return 1;
  std::puts("cblas");
#endif
#if defined(CONSUMER_HAS_NCCL)
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess) return 1;
  std::printf("nccl %d\n", version);
#endif
#if defined(CONSUMER_HAS_CHECKPOINT)
  tessera::checkpoint::manifest content;
  content.block_bytes = tessera::checkpoint::min_block_bytes;
  if (tessera::checkpoint::parse_manifest(tessera::checkpoint::to_json(content), "text") != content) return 1;
  std::puts("checkpoint");
#endif
  return 0;
}
