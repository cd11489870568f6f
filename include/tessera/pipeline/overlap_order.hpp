// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The order in which the forward of one chunk and the backward of another are interleaved, or two batches that go the
/// same way, so that each computes while the other's rows travel: as data, for any lane policy to run.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// The phases of a layer of a chunk: attention, dispatch, MLP and combine, forward; the same backward, where attention
/// and MLP have a part for the gradient of the input and one for the weights.
enum class phase : std::uint8_t {
  forward_attention,           ///< Attention, norms, router: computes.
  forward_dispatch,            ///< Rows to the owners of their experts: communicates.
  forward_mlp,                 ///< The experts: computes.
  forward_combine,             ///< Rows back home: communicates.
  backward_combine,            ///< Adjoint of combine: output gradients to the owners; communicates.
  backward_mlp_input,          ///< Gradient of the experts' inputs: computes.
  backward_mlp_weights,        ///< Gradient of the experts' weights: computes.
  backward_dispatch,           ///< Adjoint of dispatch: input gradients back home; communicates.
  backward_attention_input,    ///< Gradient of the layer's input: computes.
  backward_attention_weights,  ///< Gradient of attention's and router's weights: computes.
};

/// Number of phases.
inline constexpr std::size_t num_phases = 10;

/// Whether a phase communicates: it runs in the communication lane, the others in the compute lane.
constexpr bool is_communication(phase p) {
  return p == phase::forward_dispatch || p == phase::forward_combine || p == phase::backward_combine ||
         p == phase::backward_dispatch;
}

/// Whether a phase communicates by sending rows as they are, which few multiprocessors do as fast as links take them;
/// the others that communicate make sums.
constexpr bool sends_rows(phase p) { return p == phase::forward_dispatch || p == phase::backward_combine; }

/// Whether a phase belongs to the forward.
constexpr bool is_forward(phase p) { return p <= phase::forward_combine; }

/// The words of DeepSeek-V3's Figure 4: `ATTN(F)`, `DISPATCH(B)`, `MLP(W)`, ...
constexpr const char* symbol_of(phase p) {
  constexpr std::array<const char*, num_phases> names = {"ATTN(F)",    "DISPATCH(F)", "MLP(F)", "COMBINE(F)",
                                                         "COMBINE(B)", "MLP(B)",      "MLP(W)", "DISPATCH(B)",
                                                         "ATTN(B)",    "ATTN(W)"};
  return names[static_cast<std::size_t>(p)];
}

/// One phase of one layer, and what it waits for.
struct overlap_node {
  phase what = phase::forward_attention;  ///< The phase.
  int layer = 0;                          ///< Layer of its chunk, counted from the chunk's input.
  int after = -1;                         ///< Index of the node whose result it needs, -1 for none.
  /// Of a phase that computes: how many phases of the communication lane may begin while it runs, if none takes longer
  /// than what it is under. The first of them begins when this one does.
  int communication = 0;
  int batch = 0;       ///< Which, where two batches go the same way (`make_two_forward_order`).
  bool sends = false;  ///< Of a phase that computes: whether the one of those that begins with it sends rows.

  /// The same node.
  constexpr bool operator==(const overlap_node&) const = default;
};

/// Phases in an order in which each comes after what it waits for. A lane runs its phases in this order, one at a time;
/// phases of different lanes run at the same time but for `after`. One lane alone may run all of them in this order.
struct overlap_order {
  std::vector<overlap_node> nodes;  ///< The phases.

  /// The same order.
  bool operator==(const overlap_order&) const = default;
};

/// Where the gradients of the experts' weights stand.
enum class overlap_style : std::uint8_t {
  attention,  ///< Behind those of their inputs: the order of DeepSeek-V3's Figure 4, where attention hides combines.
  weights,    ///< Beside combines: for blocks whose attention is short, or elsewhere.
};

/// The order of DeepSeek-V3's Figure 4 (arXiv 2412.19437), repeated for each layer:
///
///     compute:        MLP(B)      MLP(W)  MLP(F)   ATTN(B)     ATTN(W)  ATTN(F)
///     communication:  DISPATCH(F) DISPATCH(B)      COMBINE(F)  PP       COMBINE(B)
///
/// With `overlap_style::weights` MLP(W) comes later, where nothing waits for it, and hides what is left of COMBINE(F):
///
///     compute:        MLP(B)      MLP(F)       ATTN(B)     MLP(W)      ATTN(W)  ATTN(F)
///     communication:  DISPATCH(F) DISPATCH(B)  COMBINE(F)  COMBINE(B)
///
/// The forward walks up the layers, the backward down; the first `ATTN(F)` and `COMBINE(B)` come before. `PP`, the
/// transfer of the chunk's results between ranks, is the batch of messages that follows in the schedule. A chunk
/// without a partner (0 layers) gives its phases one after another.
/// @param forward_layers  Layers of the chunk that runs forward, at least 0.
/// @param backward_layers Layers of the chunk that runs backward, at least 0.
/// @param style           Where MLP(W) stands.
/// @throws invalid_argument for negative numbers.
overlap_order make_overlap_order(int forward_layers, int backward_layers,
                                 overlap_style style = overlap_style::attention);

/// The forwards of two batches through the same layers: rows of the one travel while the other computes. Batches may be
/// two halves of one batch's tokens.
/// @param layers Of either. @throws invalid_argument if it is negative.
overlap_order make_two_forward_order(int layers);

/// The whole backwards of two batches through the same layers. Gradients of a layer's weights are those of batch 0
/// before those of batch 1. @param layers Of either. @throws invalid_argument if it is negative.
overlap_order make_two_backward_order(int layers);

/// The order as text, one line per lane: `compute: ATTN(F)0 MLP(B)1 ...`; the number is the layer.
/// @param order The order.
inline std::string to_string(const overlap_order& order) {
  std::string lines[2] = {"compute:      ", "communication:"};
  for (const overlap_node& node : order.nodes) {
    lines[is_communication(node.what) ? 1 : 0] +=
        std::string(" ") + symbol_of(node.what) + std::to_string(node.layer) + (node.batch > 0 ? "'" : "");
  }
  return lines[0] + "\n" + lines[1] + "\n";
}

/// Writes the order as text. @param out Where to. @param order The order.
inline std::ostream& operator<<(std::ostream& out, const overlap_order& order) { return out << to_string(order); }

/// What an overlapped pair takes when the phases take the given times and the lanes do not slow each other down.
struct overlap_estimate {
  std::int64_t time = 0;           ///< From the first start to the last end.
  std::int64_t compute = 0;        ///< Sum over the compute lane.
  std::int64_t communication = 0;  ///< Sum over the communication lane.

  /// Share of the communication that computation hides, in [0, 1]; 1 where there is none.
  double hidden() const {
    if (communication == 0) return 1;
    return static_cast<double>(compute + communication - time) / static_cast<double>(communication);
  }
};

/// Times of an overlapped pair.
/// @param order The order. @param times Time of each phase, indexed by `phase`.
inline overlap_estimate estimate_overlap(const overlap_order& order,
                                         const std::array<std::int64_t, num_phases>& times) {
  std::vector<std::int64_t> end(order.nodes.size(), 0);
  std::int64_t ready[2] = {0, 0};
  overlap_estimate result;
  for (std::size_t i = 0; i < order.nodes.size(); ++i) {
    const overlap_node& node = order.nodes[i];
    const std::size_t lane = is_communication(node.what) ? 1 : 0;
    const std::int64_t took = times[static_cast<std::size_t>(node.what)];
    std::int64_t start = ready[lane];
    if (node.after >= 0) start = std::max(start, end[static_cast<std::size_t>(node.after)]);
    ready[lane] = end[i] = start + took;
    (lane == 1 ? result.communication : result.compute) += took;
    result.time = std::max(result.time, end[i]);
  }
  return result;
}

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/overlap_order.hpp>
