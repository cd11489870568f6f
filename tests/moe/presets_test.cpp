// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The published values, written out a second time: a preset that drifts from its model fails here.

#include <cstdint>
#include <tuple>
#include <type_traits>

#include <doctest/doctest.h>

#include <tessera/moe/presets.hpp>

namespace ts = tessera;

namespace {

namespace score = ts::score;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;
namespace activation = ts::activation;
namespace weight_layout = ts::weight_layout;
namespace presets = ts::presets;
namespace precision = ts::precision;

template <class Activation, class WeightLayout, class Preset>
constexpr bool has_experts =
    std::is_same_v<typename Preset::template experts<>, ts::experts<Activation, precision::bf16, WeightLayout>>&&
        std::is_same_v<typename Preset::template experts<precision::fp64>,
                       ts::experts<Activation, precision::fp64, WeightLayout>>;

// Types.
static_assert(std::is_same_v<presets::mixtral_8x7b::router,
                             ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss>>);
static_assert(std::is_same_v<presets::deepseek_v2_lite::router,
                             ts::router<score::softmax, select::top_k, weigh::raw, balance::sequence_loss>>);
static_assert(std::is_same_v<presets::deepseek_v3::router,
                             ts::router<score::sigmoid, select::group_limited<select::group_score::top2_sum>,
                                        weigh::normalized, balance::bias, balance::sequence_loss>>);
static_assert(std::is_same_v<presets::qwen3_30b_a3b::router,
                             ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss>>);
static_assert(
    std::is_same_v<presets::olmoe::router,
                   ts::router<score::softmax, select::top_k, weigh::raw, balance::switch_loss, balance::z_loss>>);
static_assert(
    std::is_same_v<presets::gpt_oss_120b::router, ts::router<score::softmax_selected, select::top_k, weigh::raw>>);
static_assert(std::is_same_v<presets::glm_4_5::router, ts::router<score::sigmoid, select::top_k, weigh::normalized,
                                                                  balance::bias, balance::sequence_loss>>);
static_assert(std::is_same_v<presets::llama4_maverick::router,
                             ts::router<score::sigmoid_selected, select::top_k, weigh::on_input<weigh::raw>>>);

static_assert(has_experts<activation::swiglu, weight_layout::out_in_concatenated, presets::mixtral_8x7b>);
static_assert(has_experts<activation::swiglu, weight_layout::out_in_concatenated, presets::deepseek_v2_lite>);
static_assert(has_experts<activation::swiglu, weight_layout::out_in_concatenated, presets::deepseek_v3>);
static_assert(has_experts<activation::swiglu, weight_layout::out_in_concatenated, presets::qwen3_30b_a3b>);
static_assert(has_experts<activation::swiglu, weight_layout::out_in_concatenated, presets::olmoe>);
static_assert(has_experts<activation::clamped_swiglu, weight_layout::in_out_interleaved, presets::gpt_oss_120b>);
static_assert(has_experts<activation::swiglu, weight_layout::out_in_concatenated, presets::glm_4_5>);
static_assert(has_experts<activation::swiglu, weight_layout::in_out_concatenated, presets::llama4_maverick>);

static_assert(presets::llama4_maverick::router::weights_on_input && !presets::deepseek_v3::router::weights_on_input);
static_assert(presets::deepseek_v3::router::has_bias && presets::glm_4_5::router::has_bias);
static_assert(!presets::gpt_oss_120b::router::has_bias, "its bias is that of the linear, which is trained");

// Sizes.
static_assert(presets::mixtral_8x7b::dimensions(4096) ==
              ts::shape{.num_experts = 8, .top_k = 2, .hidden = 4096, .intermediate = 14336, .max_tokens = 4096});
static_assert(
    presets::deepseek_v2_lite::dimensions(1) ==
    ts::shape{
        .num_experts = 64, .top_k = 6, .hidden = 2048, .intermediate = 1408, .max_tokens = 1, .num_shared_experts = 2});
static_assert(presets::deepseek_v3::dimensions(8192) == ts::shape{.num_experts = 256,
                                                                  .top_k = 8,
                                                                  .hidden = 7168,
                                                                  .intermediate = 2048,
                                                                  .max_tokens = 8192,
                                                                  .num_shared_experts = 1});
static_assert(presets::qwen3_30b_a3b::dimensions(0) ==
              ts::shape{.num_experts = 128, .top_k = 8, .hidden = 2048, .intermediate = 768, .max_tokens = 0});
static_assert(presets::olmoe::dimensions(16) ==
              ts::shape{.num_experts = 64, .top_k = 8, .hidden = 2048, .intermediate = 1024, .max_tokens = 16});
static_assert(presets::gpt_oss_120b::dimensions(16) == ts::shape{.num_experts = 128,
                                                                 .top_k = 4,
                                                                 .hidden = 2880,
                                                                 .intermediate = 2880,
                                                                 .max_tokens = 16,
                                                                 .gate_bias = true,
                                                                 .expert_bias = true});
static_assert(presets::glm_4_5::dimensions(16) == ts::shape{.num_experts = 160,
                                                            .top_k = 8,
                                                            .hidden = 5120,
                                                            .intermediate = 1536,
                                                            .max_tokens = 16,
                                                            .num_shared_experts = 1});
static_assert(presets::llama4_maverick::dimensions(16) == ts::shape{.num_experts = 128,
                                                                    .top_k = 1,
                                                                    .hidden = 5120,
                                                                    .intermediate = 8192,
                                                                    .max_tokens = 16,
                                                                    .num_shared_experts = 1});

// Values.
static_assert(std::get<0>(presets::mixtral_8x7b::options().balance).coefficient == 0.04f);
static_assert(presets::mixtral_8x7b::options().weigh.scale == 1.0f);
static_assert(presets::mixtral_8x7b::options().weigh.epsilon == 0.0f);

static_assert(std::get<0>(presets::deepseek_v2_lite::options().balance).coefficient == 0.001f);
static_assert(presets::deepseek_v2_lite::options().weigh.scale == 1.0f);

static_assert(presets::deepseek_v3::options().select.groups == 8);
static_assert(presets::deepseek_v3::options().select.kept_groups == 4);
static_assert(presets::deepseek_v3::options().weigh.scale == 2.5f);
static_assert(presets::deepseek_v3::options().weigh.epsilon == 0.0f);
static_assert(std::get<0>(presets::deepseek_v3::options().balance).rate == 0.001f);
static_assert(std::get<1>(presets::deepseek_v3::options().balance).coefficient == 0.0001f);

static_assert(std::get<0>(presets::qwen3_30b_a3b::options().balance).coefficient == 0.008f);
static_assert(presets::qwen3_30b_a3b::options().weigh.scale == 1.0f);

static_assert(std::get<0>(presets::olmoe::options().balance).coefficient == 0.01f);
static_assert(std::get<1>(presets::olmoe::options().balance).coefficient == 0.001f);
static_assert(presets::olmoe::options().weigh.scale == 1.0f);

static_assert(presets::gpt_oss_120b::activation_options().limit == 7.0);
static_assert(presets::gpt_oss_120b::activation_options().alpha == 1.702);
static_assert(presets::gpt_oss_120b::activation_options().up_offset == 1.0);
static_assert(presets::gpt_oss_120b::options().weigh.scale == 1.0f);

static_assert(presets::glm_4_5::options().weigh.scale == 2.5f);
static_assert(presets::glm_4_5::options().weigh.epsilon == 1e-20f);
static_assert(std::get<0>(presets::glm_4_5::options().balance).rate == 0.001f);
static_assert(std::get<1>(presets::glm_4_5::options().balance).coefficient == 0.0001f);

static_assert(presets::llama4_maverick::options().weigh.scale == 1.0f);

}  // namespace

TEST_CASE_TEMPLATE("a preset's router can be made, and has the experts of its sizes", Preset, presets::mixtral_8x7b,
                   presets::deepseek_v2_lite, presets::deepseek_v3, presets::qwen3_30b_a3b, presets::olmoe,
                   presets::gpt_oss_120b, presets::glm_4_5, presets::llama4_maverick) {
  constexpr ts::shape dimensions = Preset::dimensions(4096);
  const typename Preset::router router(Preset::options());  // throws where values do not fit together
  CHECK(router.num_experts() == dimensions.num_experts);
  CHECK(router.top_k() == dimensions.top_k);
  CHECK(dimensions.max_tokens == 4096);
}
