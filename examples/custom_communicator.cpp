// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

/// @file
/// A communicator of one's own: ranks are forked processes joined by socket pairs. Four members and a base class give
/// every collective of the library, with the same bits as threads and MPI. The program sums a vector over 4 processes
/// and prints the bytes that each of them sent to each other one.

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <tessera/comm/collectives.hpp>

namespace ts = tessera;

class socket_communicator : public ts::comm::collectives<socket_communicator> {
 public:
  // sockets[r] leads to rank r; the one to this rank is not used. They stay open: the process owns them.
  socket_communicator(int rank, std::vector<int> sockets) : rank_(rank), sockets_(std::move(sockets)) {
    sent_.resize(sockets_.size());
  }

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(sockets_.size()); }
  const std::vector<std::int64_t>& bytes_sent() const { return sent_; }

  socket_communicator split(int color, int key) {
    struct choice {
      int color, key, rank;
    };
    const choice own{color, key, rank_};
    std::vector<choice> all(sockets_.size());
    all_gather({}, &own, all.data(), 1);
    std::erase_if(all, [&](const choice& c) { return c.color != color; });
    std::stable_sort(all.begin(), all.end(), [](const choice& a, const choice& b) { return a.key < b.key; });
    std::vector<int> sockets;
    int place = 0;
    for (const choice& c : all) {
      if (c.rank == rank_) place = static_cast<int>(sockets.size());
      sockets.push_back(sockets_[static_cast<std::size_t>(c.rank)]);
    }
    return {place, std::move(sockets)};
  }

  // Moves whatever can move, in the order of each pair, until nothing is left or nothing moves for 10 s.
  void exchange_remote(std::span<const ts::transfer> sends, std::span<const ts::transfer> receives, const char* phase) {
    std::vector<ts::transfer> out(sends.begin(), sends.end());
    std::vector<ts::transfer> in(receives.begin(), receives.end());
    while (!out.empty() || !in.empty()) {
      std::vector<pollfd> waiting(sockets_.size());
      for (std::size_t r = 0; r < sockets_.size(); ++r) waiting[r] = {-1, 0, 0};
      const auto want = [&](const std::vector<ts::transfer>& transfers, short event) {
        for (const ts::transfer& t : transfers) {
          pollfd& peer = waiting[static_cast<std::size_t>(t.peer)];
          peer.fd = sockets_[static_cast<std::size_t>(t.peer)];
          peer.events = static_cast<short>(peer.events | event);
        }
      };
      want(out, POLLOUT);
      want(in, POLLIN);
      const int peer = (in.empty() ? out : in).front().peer;
      if (poll(waiting.data(), waiting.size(), 10000) == 0) fail(phase, "does not answer", peer);
      const auto advance = [&](std::vector<ts::transfer>& transfers, auto move) {
        std::vector<bool> blocked(sockets_.size());  // a later message must not pass an earlier one to the same rank
        for (ts::transfer& t : transfers) {
          if (blocked[static_cast<std::size_t>(t.peer)]) continue;
          const ssize_t bytes = move(sockets_[static_cast<std::size_t>(t.peer)], t);
          if (bytes == 0 || (bytes < 0 && errno != EAGAIN && errno != EINTR)) fail(phase, "is gone", t.peer);
          if (bytes > 0) t = {t.peer, static_cast<char*>(t.data) + bytes, t.bytes - bytes};
          blocked[static_cast<std::size_t>(t.peer)] = t.bytes > 0;
        }
        std::erase_if(transfers, [](const ts::transfer& t) { return t.bytes == 0; });
      };
      advance(out, [&](int socket, const ts::transfer& t) {
        const ssize_t bytes = send(socket, t.data, static_cast<std::size_t>(t.bytes), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (bytes > 0) sent_[static_cast<std::size_t>(t.peer)] += bytes;
        return bytes;
      });
      advance(in, [](int socket, const ts::transfer& t) {
        return recv(socket, t.data, static_cast<std::size_t>(t.bytes), MSG_DONTWAIT);
      });
    }
  }

 private:
  [[noreturn]] void fail(const char* phase, const char* what, int peer) const {
    throw ts::comm_error(
        "rank " + std::to_string(rank_) + " in " + phase + ": rank " + std::to_string(peer) + " " + what, rank_, peer,
        phase);
  }

  int rank_;
  std::vector<int> sockets_;
  std::vector<std::int64_t> sent_;
};

static_assert(ts::host_communicator<socket_communicator>);

// What every process does. True if the sums are right.
static bool work(socket_communicator& comm) {
  std::vector<double> values(100000, comm.rank() + 1.0);
  comm.all_reduce({}, values.data(), values.data(), static_cast<std::int64_t>(values.size()));
  socket_communicator half = comm.split(comm.rank() % 2, 0);
  int ranks_of_half = comm.rank();
  half.all_reduce({}, &ranks_of_half, &ranks_of_half, 1);

  const auto n = static_cast<std::size_t>(comm.size());
  const std::vector<std::int64_t> sent = comm.bytes_sent();
  std::vector<std::int64_t> table(n * n);
  comm.all_gather({}, sent.data(), table.data(), comm.size());
  if (comm.rank() == 0) {
    std::printf("sum over %d processes: %g\nbytes sent, one row per sender:\n", comm.size(), values.front());
    for (std::size_t i = 0; i < n * n; ++i)
      std::printf("%9lld%s", static_cast<long long>(table[i]), (i + 1) % n ? "" : "\n");
  }
  comm.barrier({});
  return values.back() == comm.size() * (comm.size() + 1) / 2.0 && ranks_of_half == (comm.rank() % 2 ? 4 : 2);
}

int main() {
  constexpr int num_ranks = 4;
  std::vector<std::vector<int>> sockets(num_ranks, std::vector<int>(num_ranks, -1));
  for (std::size_t a = 0; a < num_ranks; ++a) {
    for (std::size_t b = a + 1; b < num_ranks; ++b) {
      int pair[2];
      if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0) return EXIT_FAILURE;
      sockets[a][b] = pair[0];
      sockets[b][a] = pair[1];
    }
  }
  int rank = 0;
  for (int r = 1; r < num_ranks && rank == 0; ++r) {
    if (fork() == 0) rank = r;
  }
  for (int r = 0; r < num_ranks; ++r) {  // so that the others see when a process ends
    for (const int socket : sockets[static_cast<std::size_t>(r)]) {
      if (r != rank && socket >= 0) close(socket);
    }
  }
  bool good = false;
  try {
    socket_communicator comm(rank, sockets[static_cast<std::size_t>(rank)]);
    good = work(comm);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
  }
  int status = 0;
  while (rank == 0 && wait(&status) > 0) good = good && status == 0;
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
