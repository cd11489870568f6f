// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Loading: on any number of ranks that hold any parts, each byte read once, everything compared with its checksum
/// before the first byte of the caller's memory changes.

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include <tessera/checkpoint/directory.hpp>
#include <tessera/checkpoint/io.hpp>
#include <tessera/checkpoint/manifest.hpp>
#include <tessera/checkpoint/piece.hpp>
#include <tessera/checkpoint/read_plan.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/log.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Options of loading.
struct load_options {
  log_sink log = {};          ///< Gets notes of rank 0.
  io_observer observer = {};  ///< Sees this rank's accesses; called by these threads, by one at a time.
  /// How many threads of this rank read, compare and copy, at least 1, the caller's included; only the caller's uses
  /// the communicator. With 2, the disk works while checksums are computed; more are for disks faster than two threads.
  int num_threads = 2;
};

/// What a load tells.
struct load_result {
  train_state state;            ///< Of the run, the same on all ranks.
  std::string path;             ///< Folder of the checkpoint.
  std::int64_t bytes_read = 0;  ///< Bytes of elements that this rank has read from files.
};

/// Loads parts of a checkpoint into memory. Any number of ranks may want any parts; tensors that nobody wants are not
/// read. Each block of a file (`plan_options::block_bytes`) is read by one of the ranks that want some of it, compared
/// with its checksum, and sent to the others. Collective; host memory.
///
/// On an error in the checkpoint, or on any rank, all ranks throw and no memory has changed: what a rank reads is kept
/// beside its pieces until all ranks agree that everything is right, which takes memory for its share, at most as much
/// as its pieces have. Only a rank that dies during the exchange (comm_error) leaves them undefined.
/// @param comm    The ranks that load: not necessarily as many as saved.
/// @param path    Folder of one checkpoint, as `find_checkpoint` gives it; all ranks see it.
/// @param targets What this rank wants, and where it goes. Parts may overlap between ranks, memory may not.
/// @param options Log and observer.
/// @throws checkpoint_error on all ranks, naming file and tensor; comm_error if a rank does not come.
template <host_communicator Comm>
load_result load(Comm& comm, const std::string& path, std::span<const target_piece> targets,
                 const load_options& options = {});

/// The same from a manifest in memory, for files that have none, for example `hugging_face_manifest`.
/// @param comm    As above.
/// @param path    Folder of the files.
/// @param content The same on all ranks.
/// @param targets As above.
/// @param options As above.
/// @throws As above.
template <host_communicator Comm>
load_result load(Comm& comm, const std::string& path, const manifest& content, std::span<const target_piece> targets,
                 const load_options& options = {});

/// Loads the checkpoint to go on from, if there is one: `find_checkpoint`, then `load`. Collective.
/// @param comm      As above.
/// @param directory Folder of checkpoints.
/// @param targets   As above.
/// @param options   As above.
/// @return Nothing if there is no checkpoint: memory is as it was.
/// @throws As above.
template <host_communicator Comm>
std::optional<load_result> resume(Comm& comm, const std::string& directory, std::span<const target_piece> targets,
                                  const load_options& options = {}) {
  const std::optional<std::string> path = find_checkpoint(comm, directory, options.log, options.observer);
  if (!path) return std::nullopt;
  return load(comm, *path, targets, options);
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END

#include <tessera/checkpoint/detail/load.hpp>
