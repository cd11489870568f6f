// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One process a rank, host memory over MPI. Needs an MPI installation (link `MPI::MPI_CXX`), so no other header
/// includes this one.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <tessera/comm/collectives.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/comm/detail/mpi_world.hpp>
#include <tessera/comm/detail/split.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace comm {

/// Starts MPI where the program has not, and finalises it then: for programs without an engine that does. MPI is used
/// from one thread at a time (`MPI_THREAD_FUNNELED`).
class mpi_session {
 public:
  /// @throws tessera::error if MPI cannot start, or not with that thread level.
  mpi_session() {
    int running = 0;
    MPI_Initialized(&running);
    if (running != 0) return;
    int provided = MPI_THREAD_SINGLE;
    const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    TESSERA_EXPECTS_AS(error, code == MPI_SUCCESS, "MPI_Init_thread failed: " << detail::mpi_error_text(code));
    owner_ = true;
    if (provided >= MPI_THREAD_FUNNELED) return;
    MPI_Finalize();
    throw error("MPI provides thread level " + std::to_string(provided) + ", MPI_THREAD_FUNNELED (" +
                std::to_string(MPI_THREAD_FUNNELED) + ") is needed");
  }
  mpi_session(const mpi_session&) = delete;
  mpi_session& operator=(const mpi_session&) = delete;
  ~mpi_session() {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (owner_ && finalized == 0) MPI_Finalize();
  }

 private:
  bool owner_ = false;
};

/// Options of `comm::mpi`.
struct mpi_options {
  /// How long an operation may wait without any progress, at least 1 ms.
  std::chrono::milliseconds timeout{30000};
  /// Larger messages travel in pieces, in [1, 2^31 - 1]: the most that MPI's counts can say. The same on all ranks.
  std::int64_t max_message_bytes = std::int64_t{1} << 30;
};

/// One rank of an MPI communicator, which is duplicated; MPI is started and finalised elsewhere (`mpi_session`).
///
/// All collectives are those of `collectives`, so results are the same bits as with `comm::threads`. Waits poll, and
/// are bounded by the timeout. A rank that calls `fail`, gets an MPI error, receives another size than it expects or
/// misses a peer tells every rank of the world; their operations throw a `comm_error` that names the same culprit, or
/// their own timeout does when no message comes through; an operation that still finds all its messages may come to an
/// end before. Before a timeout is blamed on a rank, the ranks waited for are
/// asked whom they wait for, so that the rank that is really absent is named. Ranks in errors are ranks of the world,
/// not of a sub-communicator. Nothing here calls `MPI_Abort` or ends the process.
///
/// A failure is final: all operations of this world and of its sub-communicators throw from then on. Go on with a new
/// `comm::mpi`, or restart from a checkpoint. When an operation throws, its receives are cancelled; one that MPI has
/// begun to fill and cannot cancel, and sends that no peer has taken, stay with MPI: keep the buffers of an operation
/// that threw until MPI is finalised. Creation, `split` (after all ranks have come) and destruction use MPI's own
/// collective calls, which are not bounded. Handles are destroyed before MPI is finalised, in the same order on all
/// ranks unless a failure came before.
///
/// A handle, its copies and its sub-communicators are used by one thread at a time.
class mpi : public collectives<mpi> {
 public:
  /// Collective over `communicator`. @param communicator Of the engine, stays usable beside this one.
  /// @param options Timeout and message size. @throws invalid_argument for wrong values or when MPI is not running,
  /// tessera::error if MPI fails.
  explicit mpi(MPI_Comm communicator, mpi_options options = {})
      : world_(
            (expect_usable(communicator, options), std::make_shared<detail::mpi_world>(communicator, options.timeout))),
        group_(world_->group()),
        rank_(world_->rank()),
        max_message_bytes_(options.max_message_bytes) {}

  /// This rank, in `[0, size())`.
  int rank() const noexcept { return rank_; }
  /// Number of ranks.
  int size() const noexcept { return static_cast<int>(group_->world_ranks.size()); }
  /// This rank in the communicator that was made from MPI's: the number that errors use.
  int world_rank() const noexcept { return world_->rank(); }
  /// How long an operation may wait without any progress.
  std::chrono::milliseconds timeout() const noexcept { return world_->timeout; }
  /// The duplicate of MPI's communicator. Tags 0 and 1 of its point-to-point messages are in use.
  MPI_Comm native() const noexcept { return group_->get(); }

  /// Collective: the ranks of equal color form a communicator, ordered by key, then by rank. It shares failures with
  /// this one. @param color Not negative. @param key Any.
  /// @throws invalid_argument on all ranks if the color of any is negative.
  mpi split(int color, int key) {
    const std::vector<int> members = detail::split_members(
        color, key, size(), [&](const auto* send, auto* recv) { this->gather(send, recv, 1, "split"); });
    const auto place = static_cast<int>(std::find(members.begin(), members.end(), rank_) - members.begin());
    std::vector<int> world_ranks;
    for (const int member : members) world_ranks.push_back(group_->world_ranks[static_cast<std::size_t>(member)]);
    MPI_Comm part = MPI_COMM_NULL;
    world_->check(MPI_Comm_split(group_->get(), color, place, &part), "MPI_Comm_split", "split");
    world_->check(MPI_Comm_set_errhandler(part, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler", "split");
    mpi result(*this);
    result.group_ = std::make_shared<detail::mpi_group>(part, std::move(world_ranks));
    result.rank_ = place;
    return result;
  }

  /// Tells all ranks of the world that this one cannot go on: their operations throw `comm_error`, waiting or not. Does
  /// not wait and does not throw. The first failure counts. The process should reach `MPI_Finalize` afterwards, which
  /// lets MPI deliver the message. @param reason For the others' message, cut after about 700 bytes.
  void fail(const std::string& reason) {
    world_->fail(world_rank(), "rank " + std::to_string(world_rank()) + " failed: " + reason);
  }

  /// Whether operations throw because of a failure that is known here.
  bool failed() const noexcept { return world_->failed(); }

  /// The primitive of `collectives`. @param sends Messages to other ranks. @param receives Messages from other ranks.
  /// @param phase How errors call the operation.
  void exchange_remote(std::span<const transfer> sends, std::span<const transfer> receives, const char* phase) {
    world_->serve(nullptr);
    if (world_->failed()) world_->report(phase, " (earlier; the communicator is not usable any more)");
    prepare(sends, receives);
    try {
      for (const transfer& t : receives) start(t, phase, false);
      for (const transfer& t : sends) start(t, phase, true);
      wait(phase);
    } catch (...) {
      withdraw();
      throw;
    }
  }

 private:
  struct piece {
    std::int64_t bytes = 0;
    bool is_send = false;
  };

  static void expect_usable(MPI_Comm communicator, const mpi_options& options) {
    int initialized = 0;
    int finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    TESSERA_EXPECTS(initialized != 0 && finalized == 0,
                    "comm::mpi needs a running MPI: call MPI_Init_thread first, or hold a comm::mpi_session");
    TESSERA_EXPECTS(communicator != MPI_COMM_NULL, "comm::mpi: the communicator is MPI_COMM_NULL");
    TESSERA_EXPECTS(options.timeout.count() >= 1,
                    "comm::mpi: the timeout is " << options.timeout.count() << " ms, it must be at least 1 ms");
    TESSERA_EXPECTS(
        options.max_message_bytes >= 1 && options.max_message_bytes <= 0x7fffffff,
        "comm::mpi: max_message_bytes = " << options.max_message_bytes << ", it must be in [1, 2147483647]");
  }

  // Makes the lists long enough, so that nothing is allocated while messages are under way.
  void prepare(std::span<const transfer> sends, std::span<const transfer> receives) {
    std::size_t count = 0;
    for (const auto& transfers : {sends, receives}) {
      for (const transfer& t : transfers) {
        count += static_cast<std::size_t>((t.bytes - 1) / max_message_bytes_ + 1);
      }
    }
    requests_.clear();
    request_peers_.clear();
    pieces_.clear();
    requests_.reserve(count);
    request_peers_.reserve(count);
    pieces_.reserve(count);
    indices_.resize(count);
    statuses_.resize(count);
  }

  void start(const transfer& t, const char* phase, bool is_send) {
    constexpr int data_tag = 0;
    auto* data = static_cast<std::byte*>(t.data);
    for (std::int64_t done = 0; done < t.bytes;) {
      const std::int64_t bytes = (std::min)(t.bytes - done, max_message_bytes_);
      MPI_Request request = MPI_REQUEST_NULL;
      if (is_send) {
        world_->check(
            MPI_Isend(data + done, static_cast<int>(bytes), MPI_BYTE, t.peer, data_tag, group_->get(), &request),
            "MPI_Isend", phase);
      } else {
        world_->check(
            MPI_Irecv(data + done, static_cast<int>(bytes), MPI_BYTE, t.peer, data_tag, group_->get(), &request),
            "MPI_Irecv", phase);
      }
      requests_.push_back(request);
      request_peers_.push_back(group_->world_ranks[static_cast<std::size_t>(t.peer)]);
      pieces_.push_back({bytes, is_send});
      done += bytes;
    }
  }

  void wait(const char* phase) {
    using clock = std::chrono::steady_clock;
    const detail::mpi_wait operation{phase, &requests_, &request_peers_};
    const auto count = static_cast<int>(requests_.size());
    auto start = clock::now();
    bool asking = false;
    for (int open = count, idle = 0; open > 0;) {
      int done = 0;
      const int code = MPI_Testsome(count, requests_.data(), &done, indices_.data(), statuses_.data());
      if (code != MPI_ERR_IN_STATUS) world_->check(code, "MPI_Testsome", phase);
      for (int i = 0; i < done; ++i) {
        const MPI_Status& status = statuses_[static_cast<std::size_t>(i)];
        accept(indices_[static_cast<std::size_t>(i)], status,
               code == MPI_ERR_IN_STATUS ? status.MPI_ERROR : MPI_SUCCESS, phase);
      }
      if (done > 0) {
        open -= done;
        start = clock::now();
        asking = false;
        idle = 0;
        continue;
      }
      world_->serve(&operation);
      if (world_->failed()) world_->report(phase);
      const auto waited = clock::now() - start;
      if (waited >= timeout()) {
        detail::mpi_failure cause = world_->diagnose(operation);
        world_->fail(cause.culprit, std::move(cause.text));
        world_->report(phase);
      }
      if (waited >= timeout() * 3 / 4) {  // the last quarter is for finding out who is to blame
        if (!asking) world_->forget_replies();
        asking = true;
        world_->ask(operation);
      }
      if (++idle < 1000) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    }
  }

  // A message that has arrived, or a send that is done.
  void accept(int index, const MPI_Status& status, int code, const char* phase) {
    const piece& expected = pieces_[static_cast<std::size_t>(index)];
    const int peer = request_peers_[static_cast<std::size_t>(index)];
    int error_class = MPI_SUCCESS;
    if (code != MPI_SUCCESS) MPI_Error_class(code, &error_class);
    int bytes = 0;
    if (code == MPI_SUCCESS && !expected.is_send) MPI_Get_count(&status, MPI_BYTE, &bytes);
    if (code == MPI_SUCCESS && (expected.is_send || bytes == expected.bytes)) return;
    std::ostringstream text;
    if (code == MPI_SUCCESS || error_class == MPI_ERR_TRUNCATE) {
      text << "rank " << peer << " sends ";
      if (code == MPI_SUCCESS) {
        text << bytes;
      } else {
        text << "more than " << expected.bytes;
      }
      text << " bytes to rank " << world_rank() << ", which expects " << expected.bytes << " bytes in " << phase;
    } else {
      text << "the " << (expected.is_send ? "send to" : "receive from") << " rank " << peer << " failed on rank "
           << world_rank() << ": " << detail::mpi_error_text(code);
    }
    world_->fail(peer, text.str());
    world_->report(phase);
  }

  // After a failure: receives are cancelled, so that MPI does not write to buffers that their owner frees.
  void withdraw() noexcept {
    group_->abandon();
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      if (requests_[i] != MPI_REQUEST_NULL && !pieces_[i].is_send) MPI_Cancel(&requests_[i]);
    }
    constexpr int rounds = 100;  // about 10 ms for what is under way
    for (int round = 0; round < rounds; ++round) {
      int all_done = 1;
      for (MPI_Request& request : requests_) {
        int done = 1;
        if (request != MPI_REQUEST_NULL) MPI_Test(&request, &done, MPI_STATUS_IGNORE);
        all_done &= done;
      }
      if (all_done != 0) break;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    for (MPI_Request& request : requests_) {
      if (request != MPI_REQUEST_NULL) MPI_Request_free(&request);
    }
  }

  std::shared_ptr<detail::mpi_world> world_;
  std::shared_ptr<detail::mpi_group> group_;
  int rank_ = 0;
  std::int64_t max_message_bytes_ = 0;
  std::vector<MPI_Request> requests_;  // lists keep their memory between calls
  std::vector<int> request_peers_;     // world ranks
  std::vector<piece> pieces_;
  std::vector<int> indices_;
  std::vector<MPI_Status> statuses_;
};

static_assert(communicator<mpi>);

}  // namespace comm

TESSERA_NAMESPACE_END
