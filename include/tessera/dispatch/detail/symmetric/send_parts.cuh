// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/detail/launch.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/late_flags.cuh>
#include <tessera/dispatch/detail/symmetric/piece_ring.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Rows from home to the owners of their experts, as send_rows_kernel sends them, for those who use rows as they come: a
// part, a few tokens in a row, has a flag of its own, which a warp of each block posts when all of it has been written.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// Tokens of a rank that share a flag, the same on all ranks. A warp sends them one after the other, and its last ones
// when others have none left: long parts would keep all waiting, and each flag takes a release.
inline constexpr int most_told_parts = 1024;
static_assert(most_told_parts <= comm::max_symmetric_chunks);
constexpr int tokens_of_part(std::int64_t max_tokens) {
  return max_tokens <= most_told_parts ? 1 : static_cast<int>((max_tokens + most_told_parts - 1) / most_told_parts);
}

struct send_parts_task : send_task {
  comm::symmetric_view parts;  // the channel whose flags and generation parts have
  int part_tokens;
};

// Shared memory of a block: that of send_rows_kernel, and a word for what each warp tells the one that posts flags.
inline int send_parts_shared_bytes(const send_plan& plan) { return plan.shared_bytes() + 4 * plan.warps; }

// As `piece_order`, but all pieces of a part in a row, and one part of its own first.
class part_order {
 public:
  // @param first Number of this warp among `warps`.
  __device__ part_order(const send_parts_task& task, std::int64_t first, std::int64_t warps)
      : tickets_(task.view.tickets + 1), pieces_(task.part_tokens * task.plan.pieces), warps_(warps), asked_(first) {}

  __device__ std::int64_t next() {
    if (left_ == 0) {
      piece_ = asked_ * pieces_;
      left_ = pieces_;
      asked_ = warps_ + atomicAdd(tickets_, 1u);  // a part ahead, so that nobody waits for the answer
    }
    --left_;
    return piece_++;
  }

 private:
  std::uint32_t* tickets_;
  int pieces_;  // of a part
  std::int64_t warps_;
  std::int64_t asked_;  // the part after this one
  std::int64_t piece_ = 0;
  int left_ = 0;  // of this part
};

// Tells other ranks that a part of this rank's rows is there, which this thread knows.
__device__ __forceinline__ void post_part(const comm::symmetric_view& view, std::uint32_t generation, int part) {
  for (int r = 0; r < view.size; ++r) {
    if (r != view.rank) post(at_peer(view, view.chunks + view.rank * comm::max_symmetric_chunks + part, r), generation);
  }
}

// Ends the operation of parts for the kernel that sends them or for the one that uses them: whichever is the second
// one, so that its number is the same for all blocks of both. One thread of the kernel's last block.
__device__ __forceinline__ void finish_half(const comm::symmetric_view& view, std::uint32_t generation) {
  if (count_up(view.tickets + 3) == 0) return;
  finish(view, generation);
}

static __launch_bounds__((max_send_warps + 1) * warp_size, 1) TESSERA_KERNEL
    send_parts_kernel(const __grid_constant__ send_parts_task task) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const comm::symmetric_view& view = task.view;
  const int warps = task.plan.warps;  // and one that posts
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const bool sends = lane == 0 && warp < warps;

  const piece_ring ring(shared_bytes, task.plan, warp, sends);
  const flag_mail mail{ring.end()};
  if (sends) mail.write(warp, 0);  // read behind a barrier of the block
  __syncwarp();
  await_stream();  // what is read behind it, is read by plain loads, which the compiler leaves there
  const std::uint32_t generation = next_generation(view);
  const std::uint32_t told = next_generation(task.parts);
  if (block_failed(view)) return;
  if (blockIdx.x == 0 && warp == 0) announce(view, generation);

  const part_order order(task, static_cast<std::int64_t>(warp) * gridDim.x + blockIdx.x,
                         static_cast<std::int64_t>(gridDim.x) * warps);
  piece_sender sender(task, ring, order, sends);
  if (!all_entered(view, generation)) return sender.abandon();

  const auto post_told = [&](int part) { post_part(task.parts, told, part); };
  if (sends) {
    late_post flags(mail, warp, post_told);
    const std::int64_t pieces = task.num_rows * task.plan.pieces;
    const int of_part = task.part_tokens * task.plan.pieces;
    sender.send([&](std::int64_t piece) {
      flags.sent();
      if ((piece + 1) % of_part == 0 || piece + 1 == pieces) flags.unit(static_cast<int>(piece / of_part));
    });
    flags.last();
    bulk::wait_written<0>();
  } else if (warp == warps) {
    post_role(mail, warps, true, lane, post_told);
  }
  if (leave(view, generation) && threadIdx.x == 0) finish_half(task.parts, told);
#else
  static_cast<void>(task);
#endif
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
