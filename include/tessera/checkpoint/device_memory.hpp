// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Checkpoints of what lies in device memory: the types, for any compiler. The members are defined in
/// `device_memory.cuh`. Files, plans and errors are those of host memory, and either half loads what the other saved.

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include <tessera/checkpoint/detail/staging.hpp>
#include <tessera/checkpoint/load.hpp>
#include <tessera/checkpoint/piece.hpp>
#include <tessera/checkpoint/plan.hpp>
#include <tessera/checkpoint/save.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

namespace detail {
class device_copier;
}

/// How elements travel between device and host.
struct device_copy_options {
  /// Bytes of pinned host memory: two buffers of half of it, through which everything goes piece by piece. At least
  /// 1024.
  std::int64_t pinned_bytes = std::int64_t{64} << 20;
};

/// Saves checkpoints of device memory: a `saver` whose pieces have device pointers. A save is always asynchronous at
/// first: `save_async` lets a stream of its own wait for the caller's stream and returns; a thread copies this rank's
/// share of the elements through pinned memory, and writes the file from there on as `saver` does. Training goes on
/// meanwhile, up to the first kernel that changes what is saved: before it is enqueued, call `wait_copied`, which waits
/// for the copies and not for the disk.
///
/// Host memory: the pinned buffers, made at construction, and this rank's share, taken by the first save and kept.
/// Calls are collective over `comm` as those of `saver` are; `comm` is of host memory. The device is the one that was
/// current at construction, which must be current in all calls.
/// @tparam Comm A `host_communicator`.
template <class Comm>
class device_saver {
 public:
  /// Not collective; touches no file; allocates pinned memory.
  /// @param comm    The ranks that save; outlives the saver. @param options As for `saver`. @param copies How elements
  /// travel.
  /// @throws invalid_argument for options out of range, cuda_error if the runtime fails.
  device_saver(Comm& comm, save_options options, const device_copy_options& copies = {});
  device_saver(const device_saver&) = delete;
  device_saver& operator=(const device_saver&) = delete;
  /// Not collective: waits for the thread, but a save that was not waited for never becomes a checkpoint.
  ~device_saver();

  /// Starts to save what `pieces` hold when the stream gets here. Waits for an earlier save first.
  /// @param stream Whose work comes before. @param plan Made of the pieces of all ranks. @param pieces This rank's,
  /// with pointers to device memory; must not change until `wait_copied`. @param state Of the run; that of rank 0 is
  /// saved.
  /// @throws checkpoint_error on all ranks, also of the save before; comm_error if a rank does not come.
  void save_async(device_stream stream, const save_plan& plan, std::span<const source_piece> pieces,
                  const train_state& state);
  /// The same and `wait`. @param stream,plan,pieces,state As above. @return Folder of the checkpoint.
  std::string save(device_stream stream, const save_plan& plan, std::span<const source_piece> pieces,
                   const train_state& state) {
    save_async(stream, plan, pieces, state);
    return wait();
  }

  /// Waits on the host until the pieces of the save under way have been copied, or the copy has failed. Not collective.
  void wait_copied() const { copied_.wait(false); }
  /// Whether they have. Not collective.
  bool copied() const { return copied_; }

  /// Completes a save, if one is under way. @return Folder of the checkpoint, "" if none was under way.
  /// @throws checkpoint_error on all ranks if it failed.
  std::string wait() { return saver_.wait(); }
  /// Completes a save if all ranks have written their files. @return Folder of the checkpoint, "" if none was
  /// completed.
  /// @throws checkpoint_error on all ranks if it failed.
  std::string try_commit() { return saver_.try_commit(); }
  /// Whether a save is under way. Not collective; the same on all ranks.
  bool pending() const noexcept { return saver_.pending(); }
  /// Bytes that this rank has written to files of tensors in the last save. Not collective.
  std::int64_t bytes_written() const noexcept { return saver_.bytes_written(); }

 private:
  Comm* comm_;
  std::unique_ptr<detail::device_copier> copier_;
  detail::staging_memory staging_;
  std::atomic<bool> copied_{true};
  saver<Comm> saver_;  // last: its thread uses all of the above
};

/// Loads parts of a checkpoint into device memory: as `load`, all or nothing up to the copies to the device. Collective
/// over `comm`, which is of host memory; host: returns when the elements are there.
///
/// Host memory: what `load` needs, this rank's targets once more, and the pinned buffers.
/// @param stream  Where elements are copied, after what it holds. @param comm The ranks that load.
/// @param path    Folder of one checkpoint. @param targets What this rank wants, with pointers to device memory.
/// @param options Log and observer. @param copies How elements travel.
/// @throws checkpoint_error on all ranks, naming file and tensor; comm_error if a rank does not come; cuda_error if the
/// runtime fails, with targets undefined.
template <host_communicator Comm>
load_result load(device_stream stream, Comm& comm, const std::string& path, std::span<const target_piece> targets,
                 const load_options& options = {}, const device_copy_options& copies = {});

/// Loads the checkpoint to go on from, if there is one: `find_checkpoint`, then `load`. Collective.
/// @param stream,comm,targets,options,copies As above. @param directory Folder of checkpoints.
/// @return Nothing if there is no checkpoint: memory is as it was.
/// @throws As above.
template <host_communicator Comm>
std::optional<load_result> resume(device_stream stream, Comm& comm, const std::string& directory,
                                  std::span<const target_piece> targets, const load_options& options = {},
                                  const device_copy_options& copies = {}) {
  const std::optional<std::string> path = find_checkpoint(comm, directory, options.log, options.observer);
  if (!path) return std::nullopt;
  return load(stream, comm, *path, targets, options, copies);
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
