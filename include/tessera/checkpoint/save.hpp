// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Saving: all ranks write their parts at the same time, and the result appears in one step or not at all.

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <tessera/checkpoint/detail/agree.hpp>
#include <tessera/checkpoint/detail/staging.hpp>
#include <tessera/checkpoint/detail/writer.hpp>
#include <tessera/checkpoint/directory.hpp>
#include <tessera/checkpoint/io.hpp>
#include <tessera/checkpoint/piece.hpp>
#include <tessera/checkpoint/plan.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/log.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Options of `saver`.
struct save_options {
  /// Folder of checkpoints, made if it is not there. All ranks see it; one run at a time saves in it.
  std::string directory;
  /// How many checkpoints are kept, those of the highest steps; 0: all. The one that `latest` names always is.
  int keep_last = 0;
  /// Whether everything is brought to the disk before it gets its name. Without, a checkpoint survives the death of the
  /// program, but not of the machine.
  bool sync = true;
  log_sink log = {};          ///< Gets notes of rank 0.
  io_observer observer = {};  ///< Sees this rank's accesses.
};

/// Saves checkpoints of a group of ranks. Each rank writes the parts that the plan gives it to a standard safetensors
/// file of its own, in a folder with an unfinished name; rank 0 adds the manifest, brings everything to the disk, gives
/// the folder its name `step-<N>`, and renames `latest` into place last. Killed at any moment, the checkpoint before or
/// the new one is there; what is left over is deleted by the next save.
///
/// A failure on any rank, a full disk for example, becomes a checkpoint_error with the same text on all ranks; the
/// unfinished folder is deleted. Nothing of what is held in memory changes.
///
/// Asynchronous saves copy this rank's share of the elements and return; a thread of the saver's own writes the file.
/// It touches files alone: everything collective happens in the calls below, on the thread that makes them, so that
/// communicators which belong to one thread may be used. The checkpoint is complete only after `wait`, `try_commit` or
/// the next save; errors of the background appear there.
///
/// Host memory; all calls are collective over the communicator unless they say otherwise. The object belongs to one
/// thread at a time.
/// @tparam Comm A `host_communicator`.
template <class Comm>
class saver {
  static_assert(host_communicator<Comm>,
                "checkpoint::saver needs a communicator of host memory: comm::self<space::host>, comm::threads, "
                "comm::mpi, or one of your own that derives from comm::collectives.");

 public:
  /// Not collective; touches no file.
  /// @param comm    The ranks that save; outlives the saver.
  /// @param options The same on all ranks, but for the log and the observer.
  /// @throws invalid_argument if there is no directory or `keep_last` is negative.
  explicit saver(Comm& comm, save_options options);
  saver(const saver&) = delete;
  saver& operator=(const saver&) = delete;
  /// Not collective: waits for the thread, but a save that was not waited for never becomes a checkpoint.
  ~saver();

  /// Saves. A checkpoint of the same step is replaced in one step.
  /// @param plan   Made of the pieces of all ranks, the same on all.
  /// @param pieces This rank's; read until the call returns.
  /// @param state  Of the run; that of rank 0 is saved.
  /// @return Folder of the checkpoint.
  /// @throws checkpoint_error on all ranks, also of an asynchronous save that was under way: the new one does not
  /// happen then. comm_error if a rank does not come.
  std::string save(const save_plan& plan, std::span<const source_piece> pieces, const train_state& state);

  /// Starts to save. When it returns, `pieces` may change. Waits for an earlier save first.
  /// @param plan   As above; copied. @param pieces As above. @param state As above.
  /// @throws As `save`.
  void save_async(const save_plan& plan, std::span<const source_piece> pieces, const train_state& state);

  /// Starts to save without a copy: the elements stay where they are until the save is completed. For those who bring
  /// them to host memory themselves (`device_saver`). Waits for an earlier save first.
  /// @param plan   As above; copied. @param pieces As above, but read until the save is completed. @param state As
  /// above.
  /// @param before Called by the thread before it reads the first element; what it throws is a failure of this rank.
  /// @throws As `save`.
  void save_in_background(const save_plan& plan, std::span<const source_piece> pieces, const train_state& state,
                          std::function<void()> before = {});

  /// Completes an asynchronous save, if one is under way.
  /// @return Folder of the checkpoint, "" if none was under way.
  /// @throws checkpoint_error on all ranks if it failed.
  std::string wait();

  /// Completes an asynchronous save if all ranks have written their files; does not wait for that.
  /// @return Folder of the checkpoint, "" if none was completed.
  /// @throws checkpoint_error on all ranks if it failed.
  std::string try_commit();

  /// Whether a save is under way. Not collective; the same on all ranks.
  bool pending() const noexcept { return job_.has_value(); }

  /// Whether the thread of this rank is still writing. Not collective.
  bool is_writing() const noexcept { return job_.has_value() && !written_; }

  /// Bytes that this rank has written to files of tensors in the last save, headers included. Not collective.
  std::int64_t bytes_written() const noexcept { return bytes_written_; }

 private:
  struct job {
    save_plan plan_copy;  // of an asynchronous save
    const save_plan* plan = nullptr;
    train_state state;
    std::string unfinished;  // folder
    std::string nonce;
    detail::written_file written;
    detail::outcome result;
  };

  void start(job work, detail::chunk_sources sources, const detail::outcome& prepared, std::function<void()> before);
  job begin(const save_plan& plan, std::span<const source_piece> pieces, const train_state& state);
  void write(job& work, const detail::chunk_sources& sources);
  std::string commit(job& work);
  void publish(job& work, const std::vector<std::string>& written);
  void clean_up();
  void prune();
  std::string final_path(const job& work) const { return detail::join(options_.directory, step_name(work.state.step)); }

  Comm* comm_;
  save_options options_;
  std::optional<job> job_;
  detail::staging_memory staging_;
  std::int64_t bytes_written_ = 0;
  std::thread worker_;
  std::atomic<bool> written_{false};
};

}  // namespace checkpoint

TESSERA_NAMESPACE_END

#include <tessera/checkpoint/detail/save.hpp>
