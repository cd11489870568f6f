// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The mixture-of-experts layers of published models, as types with their values.
///
/// A preset names a router and experts by type and gives their values, so that
/// `moe_layer<presets::olmoe::router, presets::olmoe::experts<>, layout::block, Comm>` is that model's layer. Sizes,
/// router rules and activations are those of the published configurations and code, which each preset names. Weights
/// are in the order of the model's implementation in the `transformers` library (5.x), which stacks the experts:
/// `gate_up_proj` is `up`, `down_proj` is `down`; shared experts are stacked likewise in the layout of the preset.
///
/// Balances are part of a router's type. A preset has those that the model was trained with where that is published,
/// and none where it is not; coefficients are in the normalisation of `balance::`, for one layer. Models whose
/// published loss is a mean over their layers (Mixtral, Qwen3, OLMoE) divide the coefficient by the number of layers
/// when the engine adds the layers' losses up. A coefficient or rate of 0 switches a balance off.

#include <cstdint>

#include <tessera/core/precision.hpp>
#include <tessera/experts/experts.hpp>
#include <tessera/moe/shape.hpp>
#include <tessera/router/router.hpp>

TESSERA_NAMESPACE_BEGIN

/// Layers of published models.
namespace presets {

/// Mixtral 8x7B (Mistral AI, arXiv 2401.04088). Sizes: `config.json` of mistralai/Mixtral-8x7B-v0.1. The gate is
/// softmax over the top 2 logits (section 2.1); the same as softmax over all experts, top 2 and normalised, which is
/// how `transformers` and this preset compute it, and which gives the load-balancing loss its probabilities. Balance:
/// `router_aux_loss_coef` 0.02 of that file times K, because `transformers` does not divide the loss by K.
struct mixtral_8x7b {
  /// Softmax, top 2, normalised.
  using router = tessera::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss>;

  /// SwiGLU experts. @tparam Precision Element types.
  template <class Precision = precision::bf16>
  using experts = tessera::experts<activation::swiglu, Precision, weight_layout::out_in_concatenated>;

  /// The layer's sizes. @param max_tokens Bound of the tokens of one rank and call.
  static constexpr shape dimensions(std::int64_t max_tokens) {
    return {.num_experts = 8, .top_k = 2, .hidden = 4096, .intermediate = 14336, .max_tokens = max_tokens};
  }

  /// The router's values.
  static constexpr router::options options() {
    return {.num_experts = 8, .top_k = 2, .balance = {{.coefficient = 0.04f}}};
  }

  /// The activation's values.
  static constexpr activation::swiglu::options activation_options() { return {}; }
};

/// DeepSeek-V2-Lite (arXiv 2405.04434, appendix B). Sizes and rules: `inference/configs/config_16B.json` of the
/// DeepSeek-V3 repository and `config.json` of deepseek-ai/DeepSeek-V2-Lite (greedy top-k, no normalisation, scale 1).
/// Balance: `aux_loss_alpha` 0.001 with `seq_aux` of the latter. Two shared experts, fused to one of width 2816. The
/// first layer of the model is dense.
struct deepseek_v2_lite {
  /// Softmax, top 6, not normalised.
  using router = tessera::router<score::softmax, select::top_k, weigh::raw, balance::sequence_loss>;

  /// SwiGLU experts. @tparam Precision Element types.
  template <class Precision = precision::bf16>
  using experts = tessera::experts<activation::swiglu, Precision, weight_layout::out_in_concatenated>;

  /// The layer's sizes. @param max_tokens Bound of the tokens of one rank and call.
  static constexpr shape dimensions(std::int64_t max_tokens) {
    return {.num_experts = 64,
            .top_k = 6,
            .hidden = 2048,
            .intermediate = 1408,
            .max_tokens = max_tokens,
            .num_shared_experts = 2};
  }

  /// The router's values.
  static constexpr router::options options() {
    return {.num_experts = 64, .top_k = 6, .balance = {{.coefficient = 0.001f}}};
  }

  /// The activation's values.
  static constexpr activation::swiglu::options activation_options() { return {}; }
};

/// DeepSeek-V3 (arXiv 2412.19437, sections 2.1.2 and 4.2). Sizes and rules: `inference/configs/config_671B.json` and
/// `inference/model.py` of the DeepSeek-V3 repository: groups scored by the sum of their two best biased scores, other
/// groups masked with -inf, weights normalised without epsilon, then scaled by 2.5. Balance: bias with rate 0.001 and
/// sequence-wise loss with factor 0.0001. One shared expert. The first three layers of the model are dense.
struct deepseek_v3 {
  /// Sigmoid, 4 of 8 groups, top 8, normalised and scaled.
  using router = tessera::router<score::sigmoid, select::group_limited<select::group_score::top2_sum>,
                                 weigh::normalized, balance::bias, balance::sequence_loss>;

  /// SwiGLU experts. @tparam Precision Element types.
  template <class Precision = precision::bf16>
  using experts = tessera::experts<activation::swiglu, Precision, weight_layout::out_in_concatenated>;

  /// The layer's sizes. @param max_tokens Bound of the tokens of one rank and call.
  static constexpr shape dimensions(std::int64_t max_tokens) {
    return {.num_experts = 256,
            .top_k = 8,
            .hidden = 7168,
            .intermediate = 2048,
            .max_tokens = max_tokens,
            .num_shared_experts = 1};
  }

  /// The router's values.
  static constexpr router::options options() {
    return {.num_experts = 256,
            .top_k = 8,
            .select = {.groups = 8, .kept_groups = 4},
            .weigh = {.scale = 2.5f},
            .balance = {{.rate = 0.001f}, {.coefficient = 0.0001f}}};
  }

  /// The activation's values.
  static constexpr activation::swiglu::options activation_options() { return {}; }
};

/// Qwen3-30B-A3B (arXiv 2505.09388). Sizes and rules: `config.json` of Qwen/Qwen3-30B-A3B (`norm_topk_prob` true).
/// Balance: `router_aux_loss_coef` 0.001 of that file times K, because `transformers` does not divide the loss by K;
/// the load is that of the global batch (section 2 of the report).
struct qwen3_30b_a3b {
  /// Softmax, top 8, normalised.
  using router = tessera::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss>;

  /// SwiGLU experts. @tparam Precision Element types.
  template <class Precision = precision::bf16>
  using experts = tessera::experts<activation::swiglu, Precision, weight_layout::out_in_concatenated>;

  /// The layer's sizes. @param max_tokens Bound of the tokens of one rank and call.
  static constexpr shape dimensions(std::int64_t max_tokens) {
    return {.num_experts = 128, .top_k = 8, .hidden = 2048, .intermediate = 768, .max_tokens = max_tokens};
  }

  /// The router's values.
  static constexpr router::options options() {
    return {.num_experts = 128, .top_k = 8, .balance = {{.coefficient = 0.008f}}};
  }

  /// The activation's values.
  static constexpr activation::swiglu::options activation_options() { return {}; }
};

/// OLMoE-1B-7B (arXiv 2409.02060). Sizes and rules: `config.json` of allenai/OLMoE-1B-7B-0924 (`norm_topk_prob` false;
/// `intermediate_size` 1024, where the class default of `transformers` is 2048). Balance: load-balancing loss with
/// weight 0.01 in MegaBlocks' form, which is that of `balance::switch_loss`, and router z-loss with weight 0.001
/// (section 2 of the paper).
struct olmoe {
  /// Softmax, top 8, not normalised.
  using router = tessera::router<score::softmax, select::top_k, weigh::raw, balance::switch_loss, balance::z_loss>;

  /// SwiGLU experts. @tparam Precision Element types.
  template <class Precision = precision::bf16>
  using experts = tessera::experts<activation::swiglu, Precision, weight_layout::out_in_concatenated>;

  /// The layer's sizes. @param max_tokens Bound of the tokens of one rank and call.
  static constexpr shape dimensions(std::int64_t max_tokens) {
    return {.num_experts = 64, .top_k = 8, .hidden = 2048, .intermediate = 1024, .max_tokens = max_tokens};
  }

  /// The router's values.
  static constexpr router::options options() {
    return {.num_experts = 64, .top_k = 8, .balance = {{.coefficient = 0.01f}, {.coefficient = 0.001f}}};
  }

  /// The activation's values.
  static constexpr activation::swiglu::options activation_options() { return {}; }
};

/// GPT-OSS-120B (arXiv 2508.10925). Sizes and rules: `config.json` of openai/gpt-oss-120b and `modular_gpt_oss.py` of
/// `transformers`: selection on logits of a linear with bias, softmax over the 4 selected; experts with biases on both
/// projections, stored `[in, out]`, gate and up interleaved; clamped SwiGLU with limit 7, alpha 1.702 and `up + 1`. How
/// the router was balanced in training is not published.
struct gpt_oss_120b {
  /// Top 4 logits, softmax over them.
  using router = tessera::router<score::softmax_selected, select::top_k, weigh::raw>;

  /// Clamped SwiGLU experts. @tparam Precision Element types.
  template <class Precision = precision::bf16>
  using experts = tessera::experts<activation::clamped_swiglu, Precision, weight_layout::in_out_interleaved>;

  /// The layer's sizes. @param max_tokens Bound of the tokens of one rank and call.
  static constexpr shape dimensions(std::int64_t max_tokens) {
    return {.num_experts = 128,
            .top_k = 4,
            .hidden = 2880,
            .intermediate = 2880,
            .max_tokens = max_tokens,
            .gate_bias = true,
            .expert_bias = true};
  }

  /// The router's values.
  static constexpr router::options options() { return {.num_experts = 128, .top_k = 4}; }

  /// The activation's values.
  static constexpr activation::clamped_swiglu::options activation_options() {
    return {.limit = 7.0, .alpha = 1.702, .up_offset = 1.0};
  }
};

/// GLM-4.5, 355B-A32B (arXiv 2508.06471). Sizes: table 1 of the report; rules: `modeling_glm4_moe.py` of `transformers`
/// (one group, weights normalised with epsilon 1e-20) and `routed_scaling_factor` 2.5 of zai-org/GLM-4.5. Balance: bias
/// with rate 0.001 and sequence-level loss with weight 0.0001 (section on hyper-parameters of the report). One shared
/// expert. The first three layers of the model are dense.
struct glm_4_5 {
  /// Sigmoid, top 8, normalised and scaled.
  using router =
      tessera::router<score::sigmoid, select::top_k, weigh::normalized, balance::bias, balance::sequence_loss>;

  /// SwiGLU experts. @tparam Precision Element types.
  template <class Precision = precision::bf16>
  using experts = tessera::experts<activation::swiglu, Precision, weight_layout::out_in_concatenated>;

  /// The layer's sizes. @param max_tokens Bound of the tokens of one rank and call.
  static constexpr shape dimensions(std::int64_t max_tokens) {
    return {.num_experts = 160,
            .top_k = 8,
            .hidden = 5120,
            .intermediate = 1536,
            .max_tokens = max_tokens,
            .num_shared_experts = 1};
  }

  /// The router's values.
  static constexpr router::options options() {
    return {.num_experts = 160,
            .top_k = 8,
            .weigh = {.scale = 2.5f, .epsilon = 1e-20f},
            .balance = {{.rate = 0.001f}, {.coefficient = 0.0001f}}};
  }

  /// The activation's values.
  static constexpr activation::swiglu::options activation_options() { return {}; }
};

/// Llama 4 Maverick, 17B-128E. Sizes: `text_config` in `config.json` of meta-llama/Llama-4-Maverick-17B-128E; rules:
/// `modeling_llama4.py` of `transformers`: selection on logits, weight = sigmoid of the selected logit, applied to the
/// expert's input; experts stored `[in, out]`. One shared expert, which takes the layout of the routed ones here (its
/// checkpoint has it transposed). Every second layer of the model is dense. How the router was balanced in training is
/// not published.
struct llama4_maverick {
  /// Top 1 logit, its sigmoid on the input.
  using router = tessera::router<score::sigmoid_selected, select::top_k, weigh::on_input<weigh::raw>>;

  /// SwiGLU experts. @tparam Precision Element types.
  template <class Precision = precision::bf16>
  using experts = tessera::experts<activation::swiglu, Precision, weight_layout::in_out_concatenated>;

  /// The layer's sizes. @param max_tokens Bound of the tokens of one rank and call.
  static constexpr shape dimensions(std::int64_t max_tokens) {
    return {.num_experts = 128,
            .top_k = 1,
            .hidden = 5120,
            .intermediate = 8192,
            .max_tokens = max_tokens,
            .num_shared_experts = 1};
  }

  /// The router's values.
  static constexpr router::options options() { return {.num_experts = 128, .top_k = 1}; }

  /// The activation's values.
  static constexpr activation::swiglu::options activation_options() { return {}; }
};

}  // namespace presets

TESSERA_NAMESPACE_END
