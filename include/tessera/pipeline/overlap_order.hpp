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
#include <utility>
#include <vector>

#include <tessera/core/error.hpp>

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

/// Fills in `overlap_node::communication` and `sends`: a phase that communicates begins with the computation behind the
/// one that it waits for, and not before the phase ahead of it in its lane. @param order The phases.
inline void count_communication(overlap_order& order) {
  int earliest = 0;  // node
  for (overlap_node& node : order.nodes) node.communication = 0, node.sends = false;
  for (const overlap_node& node : order.nodes) {
    if (!is_communication(node.what)) continue;
    earliest = std::max(earliest, node.after + 1);
    const auto found = std::find_if(order.nodes.begin() + earliest, order.nodes.end(),
                                    [](const overlap_node& other) { return !is_communication(other.what); });
    if (found == order.nodes.end()) continue;
    if (found->communication == 0) found->sends = sends_rows(node.what);
    ++found->communication;
  }
}

/// Where the gradients of the experts' weights stand.
enum class overlap_style : std::uint8_t {
  attention,  ///< Behind those of their inputs: the order of DeepSeek-V3's Figure 4, where attention hides combines.
  weights,    ///< Beside combines: for blocks whose attention is short, or elsewhere.
};

/// Makes an order phase by phase, each after the latest of the kind that it needs, of the same batch.
class order_builder {
 public:
  /// @param size How many phases.
  explicit order_builder(std::size_t size) {
    order_.nodes.reserve(size);
    for (auto& of_batch : last_) of_batch.fill(-1);
  }
  /// Adds a phase. @param what It. @param layer Of which layer. @param needs What it comes after. @param depends
  /// Whether it does. @param batch Of which batch, 0 or 1. @throws invalid_argument for another one.
  void add(phase what, int layer, phase needs, bool depends = true, int batch = 0) {
    TESSERA_EXPECTS(batch == 0 || batch == 1, "order_builder: batch = " << batch << ", it must be 0 or 1");
    auto& last = last_[static_cast<std::size_t>(batch)];
    const int after = depends ? last[static_cast<std::size_t>(needs)] : -1;
    last[static_cast<std::size_t>(what)] = static_cast<int>(order_.nodes.size());
    order_.nodes.push_back({what, layer, after, 0, batch, false});
  }
  /// The order, whose phases know what communication begins with them; the last call.
  overlap_order take() {
    count_communication(order_);
    return std::move(order_);
  }

 private:
  overlap_order order_;
  std::array<std::array<int, num_phases>, 2> last_;  // of each batch and phase: its latest node
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
inline overlap_order make_overlap_order(int forward_layers, int backward_layers,
                                        overlap_style style = overlap_style::attention) {
  TESSERA_EXPECTS(forward_layers >= 0 && backward_layers >= 0,
                  "make_overlap_order: " << forward_layers << " forward and " << backward_layers
                                         << " backward layers, neither may be negative");
  order_builder order(4 * static_cast<std::size_t>(forward_layers) + 6 * static_cast<std::size_t>(backward_layers));
  const auto add = [&](phase what, int layer, phase needs, bool depends = true) {
    order.add(what, layer, needs, depends);
  };
  using enum phase;
  const auto attention_forward = [&](int layer) {
    if (layer < forward_layers) add(forward_attention, layer, forward_combine, layer > 0);
  };
  const auto combine_backward = [&](int layer) {
    if (layer >= 0) add(backward_combine, layer, backward_attention_input, layer + 1 < backward_layers);
  };
  attention_forward(0);
  combine_backward(backward_layers - 1);
  for (int i = 0; i < std::max(forward_layers, backward_layers); ++i) {
    const int f = i;
    const int b = backward_layers - 1 - i;
    if (f < forward_layers) add(forward_dispatch, f, forward_attention);
    if (b >= 0) {
      add(backward_mlp_input, b, backward_combine);
      add(backward_dispatch, b, backward_mlp_input);
      if (style == overlap_style::attention) add(backward_mlp_weights, b, backward_mlp_input);
    }
    if (f < forward_layers) {
      add(forward_mlp, f, forward_dispatch);
      add(forward_combine, f, forward_mlp);
    }
    if (b >= 0) {
      add(backward_attention_input, b, backward_dispatch);
      combine_backward(b - 1);
      if (style == overlap_style::weights) add(backward_mlp_weights, b, backward_mlp_input);
      add(backward_attention_weights, b, backward_attention_input);
    }
    attention_forward(f + 1);
  }
  return order.take();
}

/// The forwards of two batches through the same layers: rows of the one travel while the other computes. Batches may be
/// two halves of one batch's tokens.
/// @param layers Of either. @throws invalid_argument if it is negative.
inline overlap_order make_two_forward_order(int layers) {
  TESSERA_EXPECTS(layers >= 0, "make_two_forward_order: " << layers << " layers, they may not be negative");
  order_builder order(8 * static_cast<std::size_t>(layers));
  using enum phase;
  for (int layer = 0; layer < layers; ++layer) {
    for (const int batch : {0, 1}) {
      order.add(forward_attention, layer, forward_combine, layer > 0, batch);
      order.add(forward_dispatch, layer, forward_attention, true, batch);
    }
    for (const int batch : {0, 1}) {
      order.add(forward_mlp, layer, forward_dispatch, true, batch);
      order.add(forward_combine, layer, forward_mlp, true, batch);
    }
  }
  return order.take();
}

/// The whole backwards of two batches through the same layers. Gradients of a layer's weights are those of batch 0
/// before those of batch 1. @param layers Of either. @throws invalid_argument if it is negative.
inline overlap_order make_two_backward_order(int layers) {
  TESSERA_EXPECTS(layers >= 0, "make_two_backward_order: " << layers << " layers, they may not be negative");
  order_builder order(12 * static_cast<std::size_t>(layers));
  using enum phase;
  const auto combine = [&](int layer, int batch) {
    if (layer >= 0) order.add(backward_combine, layer, backward_attention_input, layer + 1 < layers, batch);
  };
  for (const int batch : {0, 1}) combine(layers - 1, batch);
  for (int layer = layers - 1; layer >= 0; --layer) {
    for (const int batch : {0, 1}) {
      order.add(backward_mlp_input, layer, backward_combine, true, batch);
      order.add(backward_dispatch, layer, backward_mlp_input, true, batch);
    }
    for (const int batch : {0, 1}) {
      order.add(backward_mlp_weights, layer, backward_mlp_input, true, batch);
      order.add(backward_attention_input, layer, backward_dispatch, true, batch);
      combine(layer - 1, batch);
      order.add(backward_attention_weights, layer, backward_attention_input, true, batch);
    }
  }
  return order.take();
}

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
