// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The state that the communicators of `comm::mpi` share in one process: the failure, and the control messages by which
/// ranks tell one another of failures and of whom they wait for.

// The library uses MPI's C functions only; the C++ bindings, where an MPI still has them, are not to be pulled in.
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// MPI's text for an error code. @param code What a function returned.
inline std::string mpi_error_text(int code) {
  char text[MPI_MAX_ERROR_STRING + 1] = {};
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) return "MPI error " + std::to_string(code);
  return std::string(text, static_cast<std::size_t>(length));
}

/// A duplicate of an MPI communicator that returns errors. Freed with the last handle, but not after `abandon`:
/// messages of a failed operation may still be on their way to it.
class mpi_group {
 public:
  /// Takes over `comm`. @param comm A communicator of the library's own. @param world_ranks_ World rank of each member.
  mpi_group(MPI_Comm comm, std::vector<int> world_ranks_) : world_ranks(std::move(world_ranks_)), comm_(comm) {}
  mpi_group(const mpi_group&) = delete;
  mpi_group& operator=(const mpi_group&) = delete;
  ~mpi_group() {
    int finalized = 0;
    if (MPI_Finalized(&finalized) == MPI_SUCCESS && finalized == 0 && !abandoned_) MPI_Comm_free(&comm_);
  }

  /// The duplicate.
  MPI_Comm get() const noexcept { return comm_; }
  /// Leaves the communicator to MPI.
  void abandon() noexcept { abandoned_ = true; }

  const std::vector<int> world_ranks;  ///< World rank of each member.

 private:
  MPI_Comm comm_;
  bool abandoned_ = false;
};

/// Why this rank cannot go on.
struct mpi_failure {
  int culprit = -1;  ///< World rank at fault.
  std::string text;  ///< The sentence that all ranks report.
};

/// One operation of this rank.
struct mpi_wait {
  const char* phase = "";                 ///< How errors call it.
  std::vector<MPI_Request>* requests;     ///< Done ones are `MPI_REQUEST_NULL`.
  const std::vector<int>* request_peers;  ///< World rank of each request's other side.
};

/// See the file's comment. Ranks are world ranks.
class mpi_world {
 public:
  /// Collective. @param comm The engine's communicator, duplicated. @param timeout_ How long an operation may wait
  /// without any progress.
  mpi_world(MPI_Comm comm, std::chrono::milliseconds timeout_)
      : timeout((std::min)(timeout_, std::chrono::milliseconds(std::chrono::hours(24 * 365)))) {  // sums overflow else
    MPI_Comm copy = MPI_COMM_NULL;
    check_setup(MPI_Comm_dup(comm, &copy), "MPI_Comm_dup");
    check_setup(MPI_Comm_set_errhandler(copy, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    int size = 0;
    check_setup(MPI_Comm_size(copy, &size), "MPI_Comm_size");
    check_setup(MPI_Comm_rank(copy, &rank_), "MPI_Comm_rank");
    if (rank_ == 0) nonce_ = (std::uint64_t{std::random_device{}()} << 32) | std::random_device{}();
    check_setup(MPI_Bcast(&nonce_, 1, MPI_UINT64_T, 0, copy), "MPI_Bcast");
    std::vector<int> world_ranks(static_cast<std::size_t>(size));
    for (int r = 0; r < size; ++r) world_ranks[static_cast<std::size_t>(r)] = r;
    replies_.resize(static_cast<std::size_t>(size));
    group_ = std::make_shared<mpi_group>(copy, std::move(world_ranks));
  }

  mpi_world(const mpi_world&) = delete;
  mpi_world& operator=(const mpi_world&) = delete;

  ~mpi_world() {
    int finalized = 0;
    if (MPI_Finalized(&finalized) != MPI_SUCCESS || finalized != 0) return;
    reap();
    for (outgoing& message : outgoing_) {  // MPI still reads these: hand them over for good
      MPI_Request_free(&message.request);
      static_cast<void>(message.content.release());
      group_->abandon();
    }
  }

  /// The communicator of all ranks.
  const std::shared_ptr<mpi_group>& group() const noexcept { return group_; }
  /// This rank.
  int rank() const noexcept { return rank_; }
  /// Whether operations throw.
  bool failed() const noexcept { return failure_.has_value(); }

  /// Records a failure and tells every other rank, unless one is known already. Does not wait.
  void fail(int culprit, std::string text) {
    if (failure_) return;
    failure_ = mpi_failure{culprit, std::move(text)};
    group_->abandon();
    control_message message = make(kinds::failure);
    message.culprit = culprit;
    copy_text(message, failure_->text);
    for (int peer = 0; peer < static_cast<int>(group_->world_ranks.size()); ++peer) {
      if (peer != rank_) send(peer, message);
    }
  }

  /// Throws if an error code says so, after telling the others. @param code What a function returned.
  /// @param function Which one. @param phase How errors call the operation.
  void check(int code, const char* function, const char* phase) {
    if (code == MPI_SUCCESS) return;
    fail(rank_, std::string(function) + " failed on rank " + std::to_string(rank_) + ": " + mpi_error_text(code));
    report(phase);
  }

  /// Throws the failure as `comm_error`. @param phase The operation. @param suffix Goes after the message.
  [[noreturn]] void report(const char* phase, const char* suffix = "") const {
    std::ostringstream message;
    message << "rank " << rank_ << " in " << phase << ": " << failure_->text << suffix;
    throw comm_error(message.str(), rank_, failure_->culprit, phase);
  }

  /// Takes in the control messages that have arrived: failures are recorded, questions answered. @param wait The
  /// operation this rank is in, or null.
  void serve(const mpi_wait* wait);

  /// Asks the ranks on the way to the root cause, as far as it is known, whom they wait for. @param wait This rank's
  /// operation.
  void ask(const mpi_wait& wait);

  /// Concludes from the answers which rank is the root cause. @param wait This rank's operation.
  mpi_failure diagnose(const mpi_wait& wait) const;

  /// Starts a new series of questions.
  void forget_replies() {
    ++question_;
    std::fill(replies_.begin(), replies_.end(), reply{});
  }

  /// Messages of this operation that are not done, as world ranks, each once and ascending.
  static std::vector<int> missing(const mpi_wait& wait) {
    std::vector<int> peers;
    for (std::size_t i = 0; i < wait.requests->size(); ++i) {
      if ((*wait.requests)[i] != MPI_REQUEST_NULL) peers.push_back((*wait.request_peers)[i]);
    }
    std::sort(peers.begin(), peers.end());
    peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
    return peers;
  }

  const std::chrono::milliseconds timeout;  ///< How long an operation may wait without any progress.

 private:
  enum class kinds : std::int32_t { failure, question, answer };

  static constexpr int control_tag = 1;  // data has tag 0
  static constexpr int max_peers = 32;

  struct control_message {  // below every MPI's eager limit, so that sending it does not wait for the receiver
    std::uint64_t nonce;    // tells this world's messages from those of an earlier one
    std::uint64_t question;
    kinds kind;
    std::int32_t culprit;
    std::int32_t num_peers;
    std::int32_t peers[max_peers];
    char text[760];
  };

  struct outgoing {
    MPI_Request request;
    std::unique_ptr<control_message> content;
  };

  struct reply {
    bool asked = false;
    bool answered = false;
    std::string phase;
    std::vector<int> peers;  // empty: it is not waiting
  };

  static void check_setup(int code, const char* function) {
    TESSERA_EXPECTS_AS(error, code == MPI_SUCCESS, "comm::mpi: " << function << " failed: " << mpi_error_text(code));
  }

  static void copy_text(control_message& message, const std::string& text) {
    const std::size_t length = (std::min)(text.size(), sizeof(message.text) - 1);
    std::memcpy(message.text, text.data(), length);
    message.text[length] = '\0';
  }

  control_message make(kinds kind) const {
    control_message message{};
    message.nonce = nonce_;
    message.question = question_;
    message.kind = kind;
    return message;
  }

  // Errors are ignored on purpose: a rank that cannot be told finds out by its own timeout.
  void send(int peer, const control_message& message) {
    reap();
    outgoing next{MPI_REQUEST_NULL, std::make_unique<control_message>(message)};
    const int code = MPI_Isend(next.content.get(), static_cast<int>(sizeof(control_message)), MPI_BYTE, peer,
                               control_tag, group_->get(), &next.request);
    if (code == MPI_SUCCESS) outgoing_.push_back(std::move(next));
  }

  void reap() {
    std::erase_if(outgoing_, [](outgoing& message) {
      int done = 0;
      return MPI_Test(&message.request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done != 0;
    });
  }

  std::shared_ptr<mpi_group> group_;
  int rank_ = 0;
  std::uint64_t nonce_ = 0;
  std::uint64_t question_ = 0;
  std::optional<mpi_failure> failure_;
  std::vector<reply> replies_;
  std::vector<outgoing> outgoing_;
};

inline void mpi_world::serve(const mpi_wait* wait) {
  for (int misses = 0; misses < 2;) {  // a probe that finds nothing may have fetched what the next one finds
    int found = 0;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, control_tag, group_->get(), &found, &status) != MPI_SUCCESS) return;
    if (found == 0) {
      ++misses;
      continue;
    }
    control_message message{};
    if (MPI_Recv(&message, static_cast<int>(sizeof(message)), MPI_BYTE, status.MPI_SOURCE, control_tag, group_->get(),
                 MPI_STATUS_IGNORE) != MPI_SUCCESS) {
      return;
    }
    if (message.nonce != nonce_) continue;
    if (message.kind == kinds::failure && !failure_) {
      failure_ = mpi_failure{message.culprit, message.text};
      group_->abandon();
    } else if (message.kind == kinds::question && wait != nullptr) {
      control_message answer = make(kinds::answer);
      answer.question = message.question;
      copy_text(answer, wait->phase);
      for (const int peer : missing(*wait)) {
        if (answer.num_peers < max_peers) answer.peers[answer.num_peers++] = peer;
      }
      send(status.MPI_SOURCE, answer);
    } else if (message.kind == kinds::answer && message.question == question_) {
      reply& from = replies_[static_cast<std::size_t>(status.MPI_SOURCE)];
      from.answered = true;
      from.phase = message.text;
      from.peers.assign(message.peers, message.peers + message.num_peers);
    }
  }
}

inline void mpi_world::ask(const mpi_wait& wait) {
  const auto ask_one = [&](int peer) {
    reply& from = replies_[static_cast<std::size_t>(peer)];
    if (peer == rank_ || from.asked) return;
    from.asked = true;
    send(peer, make(kinds::question));
  };
  for (const int peer : missing(wait)) ask_one(peer);
  for (const reply& from : std::vector<reply>(replies_)) {
    for (const int peer : from.peers) ask_one(peer);
  }
}

inline mpi_failure mpi_world::diagnose(const mpi_wait& wait) const {
  std::ostringstream text;
  std::vector<int> waiter(replies_.size(), -1);  // who waits for this rank
  std::vector<int> order{rank_};
  for (std::size_t i = 0; i < order.size(); ++i) {
    const int current = order[i];
    const reply& from = replies_[static_cast<std::size_t>(current)];
    for (const int peer : i == 0 ? missing(wait) : from.peers) {
      if (peer == rank_ || waiter[static_cast<std::size_t>(peer)] >= 0) continue;
      waiter[static_cast<std::size_t>(peer)] = current;
      order.push_back(peer);
      if (replies_[static_cast<std::size_t>(peer)].answered) continue;
      text << "rank " << peer << " did not arrive within " << timeout.count() << " ms: rank " << current
           << " waits for it in " << (i == 0 ? std::string(wait.phase) : from.phase);
      return {peer, text.str()};
    }
  }
  text << "ranks wait for one another (";
  for (std::size_t i = 1; i < order.size(); ++i) {
    const int by = waiter[static_cast<std::size_t>(order[i])];
    text << (i > 1 ? ", " : "") << "rank " << by << " in "
         << (by == rank_ ? std::string(wait.phase) : replies_[static_cast<std::size_t>(by)].phase) << " for rank "
         << order[i];
  }
  text << ") since " << timeout.count() << " ms: all ranks of a communicator must call the same operations in the same "
       << "order";
  return {order.size() > 1 ? order[1] : -1, text.str()};
}

}  // namespace detail

TESSERA_NAMESPACE_END
