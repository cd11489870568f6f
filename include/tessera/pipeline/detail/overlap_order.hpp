// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of overlap_order.hpp.

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include <tessera/core/error.hpp>
#include <tessera/pipeline/overlap_order.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

namespace detail {

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

}  // namespace detail

inline overlap_order make_overlap_order(int forward_layers, int backward_layers, overlap_style style) {
  TESSERA_EXPECTS(forward_layers >= 0 && backward_layers >= 0,
                  "make_overlap_order: " << forward_layers << " forward and " << backward_layers
                                         << " backward layers, neither may be negative");
  detail::order_builder order(4 * static_cast<std::size_t>(forward_layers) +
                              6 * static_cast<std::size_t>(backward_layers));
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

inline overlap_order make_two_forward_order(int layers) {
  TESSERA_EXPECTS(layers >= 0, "make_two_forward_order: " << layers << " layers, they may not be negative");
  detail::order_builder order(8 * static_cast<std::size_t>(layers));
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

inline overlap_order make_two_backward_order(int layers) {
  TESSERA_EXPECTS(layers >= 0, "make_two_backward_order: " << layers << " layers, they may not be negative");
  detail::order_builder order(12 * static_cast<std::size_t>(layers));
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

}  // namespace pipeline

TESSERA_NAMESPACE_END
