// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The mesh of a training run: two views of one world, for dense parameters and for experts.

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>

#include <tessera/core/error.hpp>
#include <tessera/mesh/axes.hpp>

TESSERA_NAMESPACE_BEGIN

/// Sizes of the axes that a user chooses. Plain values: `{.dp_shard = 4, .ep = 2}`.
struct training_sizes {
  int pp = 1;            ///< Pipeline stages.
  int dp_replicate = 1;  ///< Copies of the sharded parameters (HSDP).
  int dp_shard = 0;      ///< Data-parallel ranks that shard parameters; 0: what the other axes leave of the world.
  int cp = 1;            ///< Context parallelism: parts of a sequence.
  int tp = 1;            ///< Tensor parallelism of the dense layers.
  int ep = 1;            ///< Expert parallelism. Borrows ranks of dp_shard, cp and tp: it divides their product.

  /// Same sizes.
  constexpr bool operator==(const training_sizes&) const = default;
};

namespace detail {

/// Throws: the sizes do not multiply to the world.
[[noreturn]] inline void fail_world(const training_sizes& sizes, int world);
/// Throws: ep does not divide what it borrows from.
[[noreturn]] inline void fail_expert_axis(int ep, int shared);
/// Throws: the views are not those of the sizes.
[[noreturn]] inline void fail_members(const std::string& dense, const std::string& sizes);
/// Throws: the names belong to different views.
[[noreturn]] inline void fail_views(std::string_view name, const std::string& dense, const std::string& sparse);

}  // namespace detail

/// Two views of the ranks `[0, world)`, outermost axis first, as PyTorch's torchtitan names them:
///
///     dense    pp, dp_replicate, dp_shard, cp, tp
///     sparse   pp, dp_replicate, efsdp, ep           efsdp = dp_shard * cp * tp / ep
///
/// so that a stage of the pipeline and a replica are the same ranks in both, and the ranks of one expert-parallel group
/// are neighbours. Derived axes: `dp` = `batch` = dp_replicate and dp_shard (ranks that read different sequences),
/// `fsdp` = dp_shard and cp (ranks that shard a dense parameter), `loss` = dp_replicate, dp_shard and cp (ranks that
/// hold different tokens of the loss). Tokens of an expert layer differ on tp as well: its counts are summed over
/// `along("dp_replicate", "dp_shard", "cp", "tp")`.
///
/// A plain value of a structural type: with sizes known at compile time it may be a template argument.
struct training_mesh {
  training_sizes sizes{.dp_shard = 1};  ///< All sizes, dp_shard filled in. Members are written by constructors alone.
  int efsdp = 1;                        ///< dp_shard * cp * tp / ep: ranks that shard one group of experts.
  mesh dense{{"pp", 1}, {"dp_replicate", 1}, {"dp_shard", 1}, {"cp", 1}, {"tp", 1}};  ///< View of dense parameters.
  mesh sparse{{"pp", 1}, {"dp_replicate", 1}, {"efsdp", 1}, {"ep", 1}};               ///< View of experts.

  /// One rank.
  constexpr training_mesh() = default;

  /// @param chosen Sizes; a dp_shard of 0 becomes what the other axes leave of the world. @param world Ranks.
  /// @throws invalid_argument unless all sizes are positive, `pp * dp_replicate * dp_shard * cp * tp` is `world` and
  /// `ep` divides `dp_shard * cp * tp`; the message has the numbers and the nearest right ones.
  constexpr training_mesh(const training_sizes& chosen, int world) : sizes(chosen) {
    if (world < 1) detail::fail_axis_size("world", world);
    const mesh_axis others[] = {
        {"pp", sizes.pp}, {"dp_replicate", sizes.dp_replicate}, {"cp", sizes.cp}, {"tp", sizes.tp}, {"ep", sizes.ep}};
    std::int64_t product = 1;
    for (const mesh_axis& axis : others) {
      if (axis.size < 1) detail::fail_axis_size(axis.label(), axis.size);
      if (axis.label() != "ep" && product <= world) product *= axis.size;
    }
    if (sizes.dp_shard < 0) detail::fail_axis_size("dp_shard", sizes.dp_shard);
    if (sizes.dp_shard == 0 && world % product == 0) sizes.dp_shard = static_cast<int>(world / product);
    if (product > world || product * sizes.dp_shard != world) detail::fail_world(sizes, world);
    const int shared = sizes.dp_shard * sizes.cp * sizes.tp;
    if (shared % sizes.ep != 0) detail::fail_expert_axis(sizes.ep, shared);
    efsdp = shared / sizes.ep;
    dense = mesh{others[0], others[1], {"dp_shard", sizes.dp_shard}, others[2], others[3]};
    sparse = mesh{others[0], others[1], {"efsdp", efsdp}, others[4]};
  }

  /// From its members, which is how nvcc writes a template argument for the host compiler. Checks the same.
  /// @param chosen All sizes. @param efsdp_ Follows from them. @param dense_ Has the ranks. @param sparse_ Follows.
  /// @throws invalid_argument if the members do not belong together.
  constexpr training_mesh(const training_sizes& chosen, int efsdp_, const mesh& dense_, const mesh& sparse_)
      : training_mesh(chosen, dense_.size()) {
    if (efsdp != efsdp_ || !(dense == dense_) || !(sparse == sparse_)) detail::fail_members(dense_.text(), text());
  }

  /// From text, `dp_shard=2,ep=2`: any of pp, dp_replicate, dp_shard, cp, tp and ep in any order; what is not named is
  /// 1, dp_shard what is left of the world. @param text May be empty. @param world Ranks.
  /// @throws invalid_argument if it cannot be read, or for what the constructor refuses.
  static training_mesh parse(std::string_view text, int world);

  /// The text that `parse` reads. Host: allocates.
  std::string text() const { return dense.text() + ",ep=" + std::to_string(sizes.ep); }

  /// Number of ranks.
  constexpr int size() const { return dense.size(); }

  /// Ranks along an axis of either view, or a derived one. @throws invalid_argument if there is no such axis.
  constexpr int size(std::string_view name) const { return group_of(&name, 1).size(); }

  /// The groups of ranks along axes, derived ones included: all of one view.
  /// @param names Axes in any order, each once. @throws invalid_argument if one does not exist or stands twice, or if
  /// they belong to different views (no group has both `tp` and `ep`).
  template <std::convertible_to<std::string_view>... Names>
  constexpr mesh_group along(const Names&... names) const {
    const std::string_view list[] = {std::string_view(names)..., std::string_view()};
    return group_of(list, static_cast<int>(sizeof...(Names)));
  }

  /// Ranks of one pipeline stage: pp is the outermost axis, so stage `s` is `[s * stage_size(), (s+1) * stage_size())`.
  constexpr int stage_size() const { return size() / sizes.pp; }
  /// The pipeline stage of a rank. @throws invalid_argument if there is no such rank.
  constexpr int stage(int rank) const { return dense.coordinate(rank, 0); }
  /// Place of a rank in its stage: its rank in the three meshes below. @throws invalid_argument if there is no such
  /// rank.
  constexpr int stage_rank(int rank) const { return rank - stage(rank) * stage_size(); }

  // Tensors live in one stage, so the meshes of their placements have no pp axis.

  /// Mesh of a stage's dense tensors: dp_replicate, dp_shard, cp, tp.
  constexpr mesh dense_stage() const { return dense.without("pp"); }
  /// Mesh of a stage's dense parameters, dp_shard and cp being one axis: dp_replicate, fsdp, tp.
  constexpr mesh fsdp_stage() const { return dense_stage().flattened("fsdp", "dp_shard", "cp"); }
  /// Mesh of a stage's expert parameters: dp_replicate, efsdp, ep.
  constexpr mesh sparse_stage() const { return sparse.without("pp"); }

  /// Same sizes.
  constexpr bool operator==(const training_mesh&) const = default;

 private:
  static constexpr bool is_derived(std::string_view name) {
    return name == "dp" || name == "batch" || name == "fsdp" || name == "loss";
  }

  constexpr mesh_group group_of(const std::string_view* names, int count) const {
    bool in_dense = true;
    for (int i = 0; i < count; ++i) {
      if (is_derived(names[i]) || dense.find(names[i]) >= 0) continue;
      if (sparse.find(names[i]) < 0) detail::fail_axis(names[i], text());
      in_dense = false;
    }
    mesh_group group{in_dense ? dense : sparse, 0};
    for (int i = 0; i < count; ++i) select(group, names[i]);
    return group;
  }

  constexpr void select(mesh_group& group, std::string_view name) const {
    if (is_derived(name) ? group.ranks.find("tp") < 0 : group.ranks.find(name) < 0) {
      detail::fail_views(name, dense.text(), sparse.text());
    }
    if (!is_derived(name)) return group.select(name);
    if (name != "fsdp") group.select("dp_replicate");
    group.select("dp_shard");
    if (name == "fsdp" || name == "loss") group.select("cp");
  }
};

/// The text that `training_mesh::parse` reads. Host: allocates.
inline std::string to_string(const training_mesh& ranks) { return ranks.text(); }

TESSERA_NAMESPACE_END

#include <tessera/mesh/detail/training_mesh_text.hpp>
