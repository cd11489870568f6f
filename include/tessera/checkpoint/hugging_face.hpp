// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Models as Hugging Face stores them: read into any parts of the library's tensors, and written back, by a map of
/// names that the user can write.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <tessera/checkpoint/io.hpp>
#include <tessera/checkpoint/load.hpp>
#include <tessera/checkpoint/manifest.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Name of the file that says which tensor is in which file of a model.
inline constexpr std::string_view index_name = "model.safetensors.index.json";

/// A tensor of a model and what it is of one of the library's.
struct foreign_tensor {
  std::string name;                 ///< Its name in the model.
  std::vector<std::int64_t> shape;  ///< Its extents there: those of `part`, but for extents of 1.
  box part;                         ///< Which part of the library's tensor it is, elements in the same order.
};

/// One of the library's tensors and the tensors of a model that make it up: they cover each element once.
struct mapped_tensor {
  std::string name;                   ///< Name of the library's tensor.
  box whole;                          ///< Its extents.
  std::vector<foreign_tensor> parts;  ///< What it consists of.
};

/// Which tensors of a model are which parts of the library's. Names of the model may be used once.
///
///     using namespace tessera;
///     const auto up = box::whole({E, 2 * n, d}), down = box::whole({E, d, n});
///     checkpoint::name_map names;  // weight_layout::out_in_concatenated
///     names.per_expert("layers.3.up", up, 0, n, "model.layers.3.mlp.experts.{}.gate_proj.weight")
///         .per_expert("layers.3.up", up, n, n, "model.layers.3.mlp.experts.{}.up_proj.weight")
///         .per_expert("layers.3.down", down, 0, d, "model.layers.3.mlp.experts.{}.down_proj.weight")
///         .whole("layers.3.gate", box::whole({E, d}), "model.layers.3.mlp.gate.weight");
class name_map {
 public:
  /// The library's tensor is one of the model's, fused experts `[E, ...]` among them.
  /// @param name    Name of the library's tensor. @param extents Its extents. @param foreign Name in the model.
  name_map& whole(const std::string& name, const box& extents, const std::string& foreign);

  /// Rows of the library's tensor `[E, rows, cols]` are one tensor for each expert in the model.
  /// @param name      Name of the library's tensor.
  /// @param extents   Its extents: three dimensions, or two for biases `[E, rows]`.
  /// @param first_row First row of each expert.
  /// @param rows      How many rows.
  /// @param pattern   Name in the model, `{}` where the expert's number stands.
  /// @throws invalid_argument if there is no `{}` or the rows do not lie in the tensor.
  name_map& per_expert(const std::string& name, const box& extents, std::int64_t first_row, std::int64_t rows,
                       std::string_view pattern);

  /// Anything else. @param name Name of the library's tensor. @param extents Its extents. @param part One of the model.
  /// @throws invalid_argument if the tensor was added with other extents before.
  name_map& part(const std::string& name, const box& extents, foreign_tensor part);

  /// All tensors, by name.
  const std::map<std::string, mapped_tensor>& tensors() const noexcept { return tensors_; }

 private:
  std::map<std::string, mapped_tensor> tensors_;
};

/// The manifest of a model: with it, `load` reads the model into any parts on any ranks. Tensors that the map does not
/// name are left alone. The model's files have no checksums.
/// @param folder   The model: `model.safetensors.index.json` and its files, or `model.safetensors`.
/// @param names    Which tensor is what.
/// @param observer Sees the accesses.
/// @throws checkpoint_error naming the file and the tensor if one is missing, has other extents, or those that make up
/// one tensor have different element types or do not cover it once.
manifest hugging_face_manifest(const std::string& folder, const name_map& names, const io_observer& observer = {});

/// The same on all ranks: rank 0 reads. Collective.
/// @param comm     Any ranks.
/// @param folder   As above; only read on rank 0.
/// @param names    As above; only used on rank 0.
/// @param observer As above.
/// @throws checkpoint_error on all ranks; comm_error if a rank does not come.
template <host_communicator Comm>
manifest hugging_face_manifest(Comm& comm, const std::string& folder, const name_map& names,
                               const io_observer& observer = {});

/// Options of an export.
struct export_options {
  std::int64_t max_file_bytes =
      5'000'000'000;          ///< A further file is begun rather than exceed this, one tensor at least.
  log_sink log = {};          ///< Gets notes of rank 0.
  io_observer observer = {};  ///< Sees this rank's accesses.
};

/// Writes tensors of a checkpoint as a model, with the names and extents of the map and the bytes of the checkpoint:
/// `model.safetensors`, or several files with their index. Ranks write files at the same time; one holds one file's
/// tensors in memory. The folder appears in one step. Collective.
/// @param comm    The ranks that work.
/// @param path    Folder of one checkpoint.
/// @param names   Which tensor is what, the same on all ranks.
/// @param folder  The model's folder, which must not exist.
/// @param options Sizes, log and observer.
/// @throws checkpoint_error on all ranks if the checkpoint cannot be read, the map does not cover its tensors, or the
/// folder exists or cannot be written; comm_error if a rank does not come.
template <host_communicator Comm>
void export_hugging_face(Comm& comm, const std::string& path, const name_map& names, const std::string& folder,
                         const export_options& options = {});

}  // namespace checkpoint

TESSERA_NAMESPACE_END

#include <tessera/checkpoint/detail/hugging_face.hpp>
