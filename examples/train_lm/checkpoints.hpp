// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The checkpoints of a run. `tessera/checkpoint/save.hpp` and `load.hpp` are compiled once, behind this.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include <tessera/checkpoint/piece.hpp>
#include <tessera/checkpoint/train_state.hpp>

namespace train_lm {

namespace ts = tessera;

/// A checkpoint to go on from.
struct found_checkpoint {
  std::string path;                       ///< Its folder.
  ts::checkpoint::train_state state;      ///< Of the run that saved it.
  std::map<std::string, ts::box> shapes;  ///< Of its tensors.
};

/// A folder of checkpoints. All calls are collective.
/// @tparam Comm `comm::threads` or `comm::mpi`.
template <class Comm>
class checkpoints {
 public:
  /// @param comm All ranks; outlives this. @param directory The folder. @param keep Newest that are kept; 0: all.
  checkpoints(Comm& comm, const std::string& directory, int keep);
  ~checkpoints();

  /// The newest that is whole.
  std::optional<found_checkpoint> find();
  /// Loads parts of it. @return bytes that this rank has read.
  std::int64_t load(const found_checkpoint& from, std::span<const ts::checkpoint::target_piece> pieces);

  /// Starts to save; completes an earlier save first. The pieces may change when it returns.
  void save(std::span<const ts::checkpoint::target_piece> pieces, const ts::checkpoint::train_state& state);
  /// Completes the save that is under way if all ranks have written; does not wait.
  void poll();
  /// Completes the save that is under way.
  void wait();

 private:
  struct implementation;
  std::unique_ptr<implementation> implementation_;
};

}  // namespace train_lm
