// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The model's parameters, gradients and optimizer state as `tessera::shard` divides them over a mesh: dense groups
/// over the data-parallel ranks, experts over the ranks that hold the same experts, both the same on all replicas.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <tessera/checkpoint/piece.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/layout/block.hpp>
#include <tessera/mesh/training_mesh.hpp>
#include <tessera/shard/mesh_groups.hpp>
#include <tessera/shard/shard.hpp>

#include "optimizer.hpp"
#include "parameter_store.hpp"

namespace train_lm {

/// Gradient contributions of this rank and of the rank that has most of them.
struct contribution_counts {
  std::int64_t dense = 0;         ///< Chunks of this rank.
  std::int64_t most_dense = 1;    ///< Of any rank.
  std::int64_t experts = 0;       ///< Chunks of this rank's expert-parallel group, or 1 for their sum.
  std::int64_t most_experts = 1;  ///< Of any group.
};

/// Parameters and AdamW's moments of one rank.
template <class A, ts::host_communicator Comm>
class sharded_parameters final : public parameter_store<A> {
 public:
  /// @param groups What is sharded. @param experts Experts of each layer. @param ranks Communicators of the mesh;
  /// outlive this. @param counts Gradient contributions.
  sharded_parameters(const std::vector<parameter_group>& groups, int experts, ts::shard::mesh_groups<Comm>& ranks,
                     const contribution_counts& counts)
      : groups_(groups) {
    const ts::layout::block placement(experts, ranks.expert_ranks().size());
    std::vector<ts::shard::group<Comm>> sharded;
    for (const parameter_group& from : groups_) {
      std::vector<ts::shard::parameter> parameters;
      for (const parameter& p : from.table.entries()) {
        if (from.experts) {
          parameters.push_back(ts::shard::expert_parameter(p.name, placement, ranks.expert_ranks().rank(), p.whole));
        } else {
          parameters.push_back({.name = p.name, .whole = p.whole, .decays = p.decays});
        }
      }
      ts::shard::group<Comm> group = from.experts ? ranks.experts(from.name, std::move(parameters))
                                                  : ranks.dense(from.name, std::move(parameters));
      group.chunks = from.experts ? counts.experts : counts.dense;
      group.max_chunks = from.experts ? counts.most_experts : counts.most_dense;
      group.reshard_after_forward = group.ranks->size() > 1;  // what one rank holds is whole anyway
      nothing_.resize(std::max(nothing_.size(), static_cast<std::size_t>(from.table.size())));
      counts_.push_back(group.chunks);
      sharded.push_back(std::move(group));
    }
    std::vector<ts::shard::group_shape> shapes;
    for (const auto& group : sharded) shapes.push_back(ts::shard::shape_of(group));
    // A block's dense tensors and its experts are in use at the same time: two groups.
    const ts::shard::options choices{.prefetch = 1};
    sizes_ = ts::shard::memory_of<precision, A, ts::reduction::ordered>(shapes, choices);
    state_ = ts::host_buffer(sizes_.state());
    step_ = ts::host_buffer(sizes_.step());
    sharded_ = std::make_unique<sharded_type>(std::move(sharded), choices, state_, ts::shard::step_memory(step_));
  }

  const A* use(int group) override {
    sharded_->begin_gather(group);
    sharded_->end_gather(group);
    return flat(group, [&](int i) { return sharded_->full(group, i).data(); });
  }
  void release(int group) override { sharded_->release(group); }
  contributions_of<A> gradients(int group) override {
    const std::int64_t count = counts_[static_cast<std::size_t>(group)];
    if (count == 0) return {nothing_.data(), 0, 0};
    contributions_of<A> result{nullptr, 0, count};
    for (std::int64_t c = 0; c < count; ++c) {
      A* const start = flat(group, [&](int i) { return sharded_->full_gradient(group, i, c).data(); });
      if (c == 0) result.data = start;
      if (c == 1) result.stride = start - result.data;
      TESSERA_EXPECTS(start == result.data + c * result.stride, "contributions of one group lie evenly");
    }
    return result;
  }
  void reduce(int group) override { sharded_->reduce(group); }

  /// Sets a parameter to its initial values. @param whole The tensor, or this rank's experts of it.
  void set(int group, int i, std::span<const A> whole) { sharded_->set(group, i, whole); }

  /// This rank's part of a parameter, with its summed gradient.
  auto local(int group, int i) { return sharded_->local(group, i); }

  /// The norm of all gradients, with the same bits for every mesh. @throws tessera::error if it is not finite.
  double gradient_norm() { return sharded_->gradient_norm(); }

  /// One step of AdamW. @param step From 1. @param rate Learning rate. @param scale Of the gradients, from clipping.
  void update(const adamw_options& options, std::int64_t step, double rate, double scale) {
    sharded_->step({.beta1 = options.beta1,
                    .beta2 = options.beta2,
                    .epsilon = options.epsilon,
                    .weight_decay = options.weight_decay},
                   step, rate, scale);
  }

  /// Bytes on this rank.
  const ts::shard::memory_sizes& memory() const { return sizes_; }

  /// What a checkpoint keeps: parameters and both moments.
  std::vector<ts::checkpoint::target_piece> pieces() const {
    std::vector<ts::checkpoint::target_piece> result;
    for (int g = 0; g < sharded_->num_groups(); ++g) {
      const char* placement = groups_[static_cast<std::size_t>(g)].experts ? "experts over ep, then efsdp" : "dp_shard";
      for (const ts::shard::state_array& array : sharded_->state_arrays(g)) {
        for (const ts::held_box& held : array.parts) {
          // Parts are divided along dimension 0, so what is held is one run of each part.
          const std::int64_t row = held.local.size[0] == 0 ? 0 : held.local.volume() / held.local.size[0];
          result.push_back(ts::checkpoint::piece_of(array.name,
                                                    static_cast<A*>(array.data) + held.local.offset[0] * row,
                                                    array.whole, held.logical, placement));
        }
      }
    }
    return result;
  }

 private:
  using precision = ts::precision::policy<A, A, A>;
  using sharded_type = ts::shard::fully_sharded<precision, A, ts::reduction::ordered, Comm>;

  /// The start of a group's tensors, which lie as in its table: both align them alike.
  template <class AddressOf>
  A* flat(int group, AddressOf&& address_of) const {
    const auto& entries = groups_[static_cast<std::size_t>(group)].table.entries();
    A* const start = address_of(0);
    for (std::size_t i = 0; i < entries.size(); ++i) {
      TESSERA_EXPECTS(address_of(static_cast<int>(i)) == start + entries[i].offset,
                      "'" << entries[i].name << "' does not lie where the table of its group has it");
    }
    return start;
  }

  std::vector<parameter_group> groups_;
  std::vector<std::int64_t> counts_;
  std::vector<A> nothing_;  // stands for gradients where there are none
  ts::shard::memory_sizes sizes_;
  ts::host_buffer state_, step_;
  std::unique_ptr<sharded_type> sharded_;
};

}  // namespace train_lm
