// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// All collectives of a host communicator from one primitive: the exchange of messages with other ranks.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/detail/reduce.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>

TESSERA_NAMESPACE_BEGIN

/// `exchange_remote(span<const transfer> sends, span<const transfer> receives, const char* phase)`, the primitive that
/// `comm::collectives` builds on.
template <class C>
concept communicator_has_exchange_remote = requires(C& c, std::span<const transfer> transfers, const char* phase) {
  c.exchange_remote(transfers, transfers, phase);
};

namespace comm {

/// Base class (CRTP) of host communicators: derives every collective from four members of `Derived`.
///
///     class my_communicator : public tessera::comm::collectives<my_communicator> {
///      public:
///       int rank() const;
///       int size() const;
///       my_communicator split(int color, int key);
///       void exchange_remote(std::span<const tessera::transfer> sends,
///                            std::span<const tessera::transfer> receives, const char* phase);
///     };
///
/// `exchange_remote` sees checked messages between different ranks only: at least one byte each, data not null. Every
/// operation calls it, with no message where there is nothing to do, so that it can report an earlier failure. It
/// must match the k-th send to a rank with the k-th receive there, must not wait for a receive before its sends are
/// under way, and returns when its sends may be overwritten and its receives are complete. It throws `comm_error` when
/// a peer does not do its part; `phase` names the operation for the message and is valid until it returns.
///
/// Floating-point sums are taken in rank order, so every communicator built on this class gives the same bits, run
/// after run. The object keeps the scratch memory of the largest collective so far; it belongs to one thread at a time.
/// All calls return when they are done, and throw `invalid_argument` before anything is sent when an argument is wrong
/// on this rank, `comm_error` when another rank does not do its part.
template <class Derived>
class collectives {
 public:
  using space = tessera::space::host;  ///< Buffers are ordinary memory.

  /// Returns after every rank has called it.
  void barrier(host_stream) {
    const int ranks = checked().size();
    std::byte* tokens = scratch<std::byte>(ranks);
    clear();
    for (int peer = 0; peer < ranks; ++peer) {
      if (peer == derived().rank()) continue;
      sends_.push_back(send_to(peer, tokens + derived().rank(), 1));
      receives_.push_back(receive_from(peer, tokens + peer, 1));
    }
    flush("barrier");
  }

  /// Gives everyone the elements of `root`.
  /// @param data  `[count]`, read on the root and written elsewhere.
  /// @param count Elements, the same on all ranks.
  /// @param root  Rank that has them.
  template <transferable T>
  void broadcast(host_stream, T* data, std::int64_t count, int root) {
    expect_rank(root, "broadcast", "root");
    expect_elements("broadcast", "data", data, count);
    clear();
    if (derived().rank() == root) {
      for (int peer = 0; peer < derived().size(); ++peer) add_send(peer, data, count);
    } else {
      add_receive(root, data, count);
    }
    flush("broadcast");
  }

  /// Joins the elements of all ranks; everyone gets all results. Large counts travel as a reduce-scatter of slices and
  /// an all-gather, small ones as an all-gather: the bits are the same.
  /// @param send  `[count]`, this rank's contribution.
  /// @param recv  `[count]`, equal to `send` or disjoint from it.
  /// @param count Elements, the same on all ranks.
  /// @param op    How contributions are joined, in rank order.
  template <reducible T>
  void all_reduce(host_stream, const T* send, T* recv, std::int64_t count, reduce_op op = reduce_op::sum) {
    expect_elements("all_reduce", "send", send, count, derived().size());
    expect_elements("all_reduce", "recv", recv, count, derived().size());
    if (send != recv) expect_disjoint(send, bytes_of<T>(count), "send", recv, bytes_of<T>(count), "recv");
    const int ranks = derived().size();
    const int rank = derived().rank();
    if (ranks == 1) {
      copy(send, recv, count);
      clear();
      return flush("all_reduce");
    }
    constexpr std::int64_t small_bytes = 65536;
    if (count < ranks || bytes_of<T>(count) <= small_bytes / ranks) {
      T* all = scratch<T>(ranks * count);
      gather(send, all, count, "all_reduce");
      detail::reduce_in_order(
          op, ranks, [&](std::int64_t r) { return all + r * count; }, count, recv);
      return;
    }
    const detail::slice own = detail::slice_of(count, ranks, rank);
    T* pieces = scratch<T>(ranks * own.length);
    clear();
    for (int peer = 0; peer < ranks; ++peer) {
      const detail::slice theirs = detail::slice_of(count, ranks, peer);
      add_send(peer, send + theirs.begin, theirs.length);
      add_receive(peer, pieces + peer * own.length, own.length);
    }
    flush("all_reduce");
    const auto source = [&](std::int64_t r) { return r == rank ? send + own.begin : pieces + r * own.length; };
    detail::reduce_in_order(op, ranks, source, own.length, recv + own.begin);
    clear();
    for (int peer = 0; peer < ranks; ++peer) {
      const detail::slice theirs = detail::slice_of(count, ranks, peer);
      add_send(peer, recv + own.begin, own.length);
      add_receive(peer, recv + theirs.begin, theirs.length);
    }
    flush("all_reduce");
  }

  /// Gives everyone the elements of everyone.
  /// @param send  `[count]`; may be this rank's place in `recv`.
  /// @param recv  `[size, count]`, in rank order.
  /// @param count Elements per rank, the same on all ranks.
  template <transferable T>
  void all_gather(host_stream, const T* send, T* recv, std::int64_t count) {
    expect_elements("all_gather", "send", send, count, derived().size());
    expect_elements("all_gather", "recv", recv, count, derived().size());
    if (const T* own = recv + derived().rank() * count; send != own) {
      expect_disjoint(send, bytes_of<T>(count), "send", recv, bytes_of<T>(derived().size() * count), "recv");
    }
    gather(send, recv, count, "all_gather");
  }

  /// Joins the elements of all ranks; each rank gets its part of the results.
  /// @param send  `[size, count]`: row `r` is this rank's contribution to the part of rank `r`.
  /// @param recv  `[count]`, disjoint from `send` or this rank's row of it.
  /// @param count Elements per part, the same on all ranks.
  /// @param op    How contributions are joined, in rank order.
  template <reducible T>
  void reduce_scatter(host_stream, const T* send, T* recv, std::int64_t count, reduce_op op = reduce_op::sum) {
    expect_elements("reduce_scatter", "send", send, count, derived().size());
    expect_elements("reduce_scatter", "recv", recv, count, derived().size());
    const int ranks = derived().size();
    const int rank = derived().rank();
    const T* own = send + rank * count;
    if (recv != own) expect_disjoint(send, bytes_of<T>(ranks * count), "send", recv, bytes_of<T>(count), "recv");
    T* pieces = scratch<T>(ranks * count);
    clear();
    for (int peer = 0; peer < ranks; ++peer) {
      add_send(peer, send + peer * count, count);
      add_receive(peer, pieces + peer * count, count);
    }
    flush("reduce_scatter");
    const auto source = [&](std::int64_t r) { return r == rank ? own : pieces + r * count; };
    detail::reduce_in_order(op, ranks, source, count, recv);
  }

  /// Sends each rank a part of its own. All arrays are `[size]`, in elements; `send_counts[r]` here equals
  /// `recv_counts[rank]` on rank `r`. Buffers do not overlap.
  /// @param send         Elements to send.
  /// @param send_counts  How many go to each rank.
  /// @param send_offsets Where each rank's part starts in `send`.
  /// @param recv         Where elements arrive.
  /// @param recv_counts  How many come from each rank.
  /// @param recv_offsets Where each rank's part starts in `recv`.
  template <transferable T>
  void all_to_all_v(host_stream, const T* send, const std::int64_t* send_counts, const std::int64_t* send_offsets,
                    T* recv, const std::int64_t* recv_counts, const std::int64_t* recv_offsets) {
    const int rank = checked().rank();
    for (const std::int64_t* sizes : {send_counts, send_offsets, recv_counts, recv_offsets}) {
      TESSERA_EXPECTS(sizes != nullptr, "all_to_all_v: an array of counts or offsets is null, each must hold "
                                            << derived().size() << " numbers");
    }
    for (int peer = 0; peer < derived().size(); ++peer) {
      expect_elements("all_to_all_v", "send", send, send_counts[peer]);
      expect_elements("all_to_all_v", "recv", recv, recv_counts[peer]);
      TESSERA_EXPECTS(send_offsets[peer] >= 0 && recv_offsets[peer] >= 0,
                      "all_to_all_v: offsets for rank " << peer << " are " << send_offsets[peer] << " (send) and "
                                                        << recv_offsets[peer] << " (recv), they must not be negative");
    }
    TESSERA_EXPECTS(send_counts[rank] == recv_counts[rank], "all_to_all_v: rank "
                                                                << rank << " would send itself " << send_counts[rank]
                                                                << " elements and receive " << recv_counts[rank]);
    clear();
    for (int peer = 0; peer < derived().size(); ++peer) {
      add_send(peer, send + send_offsets[peer], send_counts[peer]);
      add_receive(peer, recv + recv_offsets[peer], recv_counts[peer]);
    }
    copy(send + send_offsets[rank], recv + recv_offsets[rank], send_counts[rank]);
    flush("all_to_all_v");
  }

  /// Sends and receives messages as one group: none of them waits for another of the same group. Only the ranks named
  /// take part. The k-th message from one rank to another meets the k-th receive there, over all exchanges. Messages
  /// of 0 bytes do not happen, on either side. Messages to oneself are copies.
  /// @param sends    Messages to send; their data are only read.
  /// @param receives Messages to receive; they do not overlap.
  /// @param phase    How errors call the operation.
  void exchange(host_stream, std::span<const transfer> sends, std::span<const transfer> receives,
                const char* phase = "exchange") {
    expect_transfers(sends, phase, "sends");
    expect_transfers(receives, phase, "receives");
    const int rank = checked().rank();
    clear();
    std::size_t next = 0;  // first receive that may still meet a message of this rank to itself
    const auto is_own = [&](const transfer& t) { return t.peer == rank && t.bytes > 0; };
    const auto skip = [&] {
      while (next < receives.size() && !is_own(receives[next])) ++next;
    };
    for (const transfer& t : sends) {  // checked as a whole before the first byte moves
      if (!is_own(t)) continue;
      skip();
      const std::int64_t expected = next < receives.size() ? receives[next].bytes : 0;
      TESSERA_EXPECTS(t.bytes == expected, phase << ": rank " << rank << " would send itself " << t.bytes
                                                 << " bytes and receive " << expected);
      ++next;
    }
    skip();
    TESSERA_EXPECTS(next >= receives.size(), phase << ": rank " << rank << " would receive " << receives[next].bytes
                                                   << " bytes from itself that it does not send");
    next = 0;
    for (const transfer& t : sends) {
      if (is_own(t)) {
        skip();
        copy(static_cast<const std::byte*>(t.data), static_cast<std::byte*>(receives[next++].data), t.bytes);
      } else if (t.bytes > 0) {
        sends_.push_back(t);
      }
    }
    for (const transfer& t : receives) {
      if (t.bytes > 0 && t.peer != rank) receives_.push_back(t);
    }
    flush(phase);
  }

 protected:
  collectives() = default;
  collectives(const collectives&) = default;                 ///< Copies the scratch too: never wrong, rarely needed.
  collectives(collectives&&) noexcept = default;             ///< Takes the scratch over.
  collectives& operator=(const collectives&) = default;      ///< Copies the scratch too.
  collectives& operator=(collectives&&) noexcept = default;  ///< Takes the scratch over.
  ~collectives() = default;

  /// `all_gather` under another name in errors, for collectives of a derived class. @param send `[count]`.
  /// @param recv `[size, count]`. @param count Elements per rank. @param phase How errors call the operation.
  template <transferable T>
  void gather(const T* send, T* recv, std::int64_t count, const char* phase) {
    const int rank = checked().rank();
    clear();
    for (int peer = 0; peer < derived().size(); ++peer) {
      add_send(peer, send, count);
      add_receive(peer, recv + peer * count, count);
    }
    copy(send, recv + rank * count, count);
    flush(phase);
  }

 private:
  Derived& derived() noexcept { return static_cast<Derived&>(*this); }

  Derived& checked() noexcept {
    static_assert(communicator_has_rank<Derived> && communicator_has_size<Derived> && communicator_has_split<Derived> &&
                      communicator_has_exchange_remote<Derived>,
                  "A class derived from tessera::comm::collectives needs int rank() const, int size() const, "
                  "split(int color, int key) returning its own type, and exchange_remote(std::span<const transfer> "
                  "sends, std::span<const transfer> receives, const char* phase), all public. "
                  "Models: comm::self<space::host>, comm::threads, comm::mpi.");
    return derived();
  }

  template <class T>
  static std::int64_t bytes_of(std::int64_t count) {
    return count * static_cast<std::int64_t>(sizeof(T));
  }

  template <class T>
  T* scratch(std::int64_t count) {
    static_assert(alignof(T) <= alignof(std::max_align_t));
    const auto bytes = static_cast<std::size_t>(bytes_of<T>(count));
    if (scratch_.size() < bytes) scratch_ = std::vector<std::byte>(bytes);
    return reinterpret_cast<T*>(scratch_.data());
  }

  template <class T>
  static void copy(const T* from, T* to, std::int64_t count) {
    if (count > 0 && from != to) std::memmove(to, from, static_cast<std::size_t>(bytes_of<T>(count)));
  }

  void clear() {
    sends_.clear();
    receives_.clear();
  }

  template <class T>
  void add_send(int peer, const T* data, std::int64_t count) {
    if (count > 0 && peer != derived().rank()) sends_.push_back(send_to(peer, data, count));
  }

  template <class T>
  void add_receive(int peer, T* data, std::int64_t count) {
    if (count > 0 && peer != derived().rank()) receives_.push_back(receive_from(peer, data, count));
  }

  void flush(const char* phase) { checked().exchange_remote(sends_, receives_, phase); }

  void expect_rank(int peer, const char* phase, const char* name) {
    TESSERA_EXPECTS(peer >= 0 && peer < checked().size(), phase << ": " << name << " = " << peer
                                                                << " is not a rank of a communicator of "
                                                                << derived().size() << " ranks");
  }

  template <class T>
  void expect_elements(const char* phase, const char* name, const T* data, std::int64_t count, int parts = 1) {
    const std::int64_t limit =
        (std::numeric_limits<std::int64_t>::max)() / static_cast<std::int64_t>(sizeof(T)) / parts;
    TESSERA_EXPECTS(count >= 0 && count <= limit, phase << ": rank " << checked().rank() << " gives count = " << count
                                                        << " for " << name << ", it must be in [0, " << limit << "]");
    TESSERA_EXPECTS(count == 0 || data != nullptr, phase << ": rank " << derived().rank() << " gives no data as "
                                                         << name << " of " << count << " elements");
  }

  void expect_transfers(std::span<const transfer> transfers, const char* phase, const char* name) {
    for (const transfer& t : transfers) {
      expect_rank(t.peer, phase, name);
      TESSERA_EXPECTS(t.bytes >= 0, phase << ": " << name << " holds a message of " << t.bytes << " bytes for rank "
                                          << t.peer << ", sizes must not be negative");
      TESSERA_EXPECTS(t.bytes == 0 || t.data != nullptr, phase << ": " << name << " holds a message of " << t.bytes
                                                               << " bytes for rank " << t.peer << " without data");
    }
  }

  std::vector<transfer> sends_;     // lists and scratch keep their memory between calls: none of them
  std::vector<transfer> receives_;  // allocates once the largest call has been seen
  std::vector<std::byte> scratch_;
};

}  // namespace comm

TESSERA_NAMESPACE_END
