// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include <tessera/router/detail/device/route.cuh>
#include <tessera/router/detail/device/team.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class Score, class Select, class Weigh, class... Balances, accumulate_type A>
void route_on_device(device_stream stream, const router<Score, Select, Weigh, Balances...>& r,
                     const router_inputs<A>& in, const routing<A>& out, balance_counts counts,
                     std::type_identity_t<const router_lists<A>*> lists, const router_workspace& workspace,
                     device_status* status) {
  using router_type = router<Score, Select, Weigh, Balances...>;
  const auto& options = r.get_options();
  const int num_experts = options.num_experts;
  const std::int64_t num_tokens = in.logits.rows;
  expect_matrix(in.logits, -1, num_experts, "logits");
  check_routing_out(in, out, counts, num_experts, options.top_k);
  TESSERA_EXPECTS(in.bias == nullptr || router_type::has_bias, "a bias was given to a router without balance::bias");
  TESSERA_EXPECTS(num_tokens < INT32_MAX / max_top_k, num_tokens << " tokens are too many for one call");
  if constexpr (router_type::needs_token_ids) {
    TESSERA_EXPECTS(static_cast<std::int64_t>(in.token_ids.size()) == num_tokens,
                    "select::hash needs one token id per token, it got " << in.token_ids.size() << " for " << num_tokens
                                                                         << " tokens");
  }
  if constexpr (router_type::needs_expert_ids) {
    expect_matrix(in.expert_ids, num_tokens, options.top_k, "inputs.expert_ids");
  }
  const int num_sms = expect_device("router::route");

  route_task<Score, Select, Weigh, A> task{};
  task.score = options.score;
  task.select = options.select;
  task.weigh = options.weigh;
  bool aligned = is_vector_aligned(in.logits.data, in.logits.stride * static_cast<std::int64_t>(sizeof(A)));
  if (in.bias != nullptr) aligned = aligned && is_vector_aligned(in.bias, 16);
  int per_lane = 0;
  if constexpr (Select::by == select_by::group) {
    const int groups = options.select.groups;
    TESSERA_EXPECTS(groups <= max_device_groups,
                    "groups = " << groups << ", the device half handles at most " << max_device_groups);
    task.groups = {groups, options.select.kept_groups, num_experts / groups, 0};
    per_lane = lanes_for_groups(num_experts, num_experts / groups);
    if (per_lane != 0) task.groups.lanes_per_group = num_experts / groups / per_lane;
  }
  task.map = make_cell_map(num_experts, aligned, per_lane);
  const int stash_k = lists != nullptr ? options.top_k : 0;  // without lists nobody waits for anybody
  constexpr std::size_t pair_bytes = sizeof(A) + sizeof(std::int32_t);
  task.plan = make_list_plan(num_tokens, num_experts, num_sms, sizeof(list_scratch<A>), warp_size, stash_k, pair_bytes);
  task.logits = in.logits;
  task.bias = in.bias;
  task.token_ids = in.token_ids.data();
  task.given = in.expert_ids;
  task.sequence_offsets = in.sequence_offsets.data();
  task.num_sequence_offsets = static_cast<std::int64_t>(in.sequence_offsets.size());
  task.ids = out.expert_ids;
  task.weights = out.weights;
  task.counts = counts.data;
  task.status = status;
  if (lists != nullptr) {
    TESSERA_EXPECTS(workspace.barrier != nullptr && workspace.block_counts != nullptr,
                    "sorting on the device needs a router_workspace with a barrier and counts of blocks");
    task.has_lists = true;
    task.lists = list_task<A, same_slot>{.ids = out.expert_ids,
                                         .weights = out.weights,
                                         .lists = *lists,
                                         .workspace = workspace,
                                         .counts = counts.data,
                                         .dropped = nullptr,
                                         .kept = nullptr,
                                         .num_slots = num_experts,
                                         .capacity = INT32_MAX,
                                         .slot_of = same_slot{},
                                         .max_rows = INT32_MAX,
                                         .stashed_ids = out.expert_ids,
                                         .stashed_weights = out.weights};
  } else if (counts.data != nullptr) {
    check_cuda(
        cudaMemsetAsync(counts.data, 0, static_cast<std::size_t>(num_experts) * sizeof(std::int64_t), stream.get()),
        "cudaMemsetAsync");
  }
  if (num_tokens == 0 && lists == nullptr && counts.data == nullptr) return;

  const auto launch = [&](auto kernel, int threads) {
    if (lists != nullptr) {
      launch_cooperative(stream, task.plan, threads, kernel, task, "route_kernel", true);
    } else {
      kernel<<<static_cast<unsigned>(task.plan.num_blocks), static_cast<unsigned>(threads), task.plan.shared_bytes,
               stream.get()>>>(task);
      expect_launched("route_kernel");
    }
  };
  if constexpr (std::is_same_v<A, float> && (Select::by == select_by::key || Select::by == select_by::group) &&
                !(Score::over == score_over::all && score_selects_on_logits<Score>)) {
    if (fits_team<Select>(in, num_experts, options.top_k, task.groups)) {
      task.groups.lanes_per_group = task.groups.group_size / cell_width;
      task.plan = make_list_plan(num_tokens, num_experts, num_sms, sizeof(team_scratch), team_warps * teams_per_warp,
                                 stash_k, pair_bytes);
      if (num_experts <= team_max_experts / 2) {
        launch(route_team_kernel<Score, Select, Weigh, router_type::has_bias, 2>, team_threads);
      } else {
        launch(route_team_kernel<Score, Select, Weigh, router_type::has_bias, 4>, team_threads);
      }
      return;
    }
  }
  if (num_chunks_for(num_experts) == 1) {
    launch(route_kernel<Score, Select, Weigh, router_type::has_bias, 1, A>, list_threads);
  } else {
    launch(route_kernel<Score, Select, Weigh, router_type::has_bias, 4, A>, list_threads);
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END
