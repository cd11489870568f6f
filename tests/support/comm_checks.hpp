// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What every host communicator must do, as functions that all ranks call and that throw where it does not. They need
/// no test framework, so that the same checks run in threads and under mpirun.

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>

#include "bits.hpp"

namespace comm_checks {

using tessera_test::same_bits;

/// Thrown by a check that does not hold.
struct failed_check : std::logic_error {
  using std::logic_error::logic_error;
};

/// Throws unless `condition` holds. The rest is streamed into the message.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw failed_check(message.str());
}

/// The `Exception` that `f()` throws.
template <class Exception, class F>
Exception caught(F&& f) {
  try {
    f();
  } catch (const Exception& e) {
    return e;
  }
  throw failed_check("an exception was expected");
}

/// Contribution of `rank` to element `i`: for floating point, of sizes so different that the order of a sum shows.
template <class T>
T value(int rank, std::int64_t i, int salt = 0) {
  // splitmix64: any element can be had without those before it
  std::uint64_t bits = static_cast<std::uint64_t>(rank + 1) * 0x9e3779b97f4a7c15u +
                       static_cast<std::uint64_t>(i) * 0xd1b54a32d192ed03u + static_cast<std::uint64_t>(salt);
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  bits ^= bits >> 31;
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else {
    constexpr double scales[] = {1.0, 1e-3, 1e3, 1e8, -1e8};
    return static_cast<T>((static_cast<double>(bits >> 11) / static_cast<double>(std::uint64_t{1} << 53) - 0.5) *
                          scales[bits % 5]);
  }
}

/// `count` contributions of `rank`.
template <class T>
std::vector<T> values(int rank, std::int64_t count, int salt = 0) {
  std::vector<T> result(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) result[static_cast<std::size_t>(i)] = value<T>(rank, i, salt);
  return result;
}

/// One joined element, by definition.
template <class T>
T join(tessera::reduce_op op, T a, T b) {
  if (op == tessera::reduce_op::min) return b < a ? b : a;
  if (op == tessera::reduce_op::max) return a < b ? b : a;
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
  } else {
    return a + b;
  }
}

/// `[begin, begin + count)` of the reduction over the ranks, in rank order.
template <class T>
std::vector<T> joined(int ranks, tessera::reduce_op op, std::int64_t begin, std::int64_t count, int salt) {
  std::vector<T> result;
  for (std::int64_t i = begin; i < begin + count; ++i) {
    T sum = value<T>(0, i, salt);
    for (int r = 1; r < ranks; ++r) sum = join(op, sum, value<T>(r, i, salt));
    result.push_back(sum);
  }
  return result;
}

/// all_reduce and reduce_scatter of one element type, small and large, in place and not.
template <class T, class Comm>
void check_reductions(Comm& c) {
  using tessera::reduce_op;
  constexpr std::array<std::int64_t, 7> counts{0, 1, 2, 7, 100, 1027, 20011};
  for (const reduce_op op : {reduce_op::sum, reduce_op::min, reduce_op::max}) {
    for (const std::int64_t count : counts) {
      if (op != reduce_op::sum && count > 2000) continue;
      const auto expected = joined<T>(c.size(), op, 0, count, 1);
      const auto send = values<T>(c.rank(), count, 1);
      std::vector<T> recv(send.size(), T{77});
      c.all_reduce({}, send.data(), recv.data(), count, op);
      require(same_bits(recv, expected), "all_reduce of ", count, " elements of ", sizeof(T), " bytes");
      std::vector<T> in_place = send;
      c.all_reduce({}, in_place.data(), in_place.data(), count, op);
      require(same_bits(in_place, expected), "all_reduce in place of ", count);

      const std::int64_t part = count > 2000 ? 3001 : count;
      auto rows = values<T>(c.rank(), part * c.size(), 2);
      const auto expected_part = joined<T>(c.size(), op, part * c.rank(), part, 2);
      std::vector<T> mine(static_cast<std::size_t>(part), T{77});
      c.reduce_scatter({}, rows.data(), mine.data(), part, op);
      require(same_bits(mine, expected_part), "reduce_scatter of ", part);
      T* own = rows.data() + part * c.rank();
      c.reduce_scatter({}, rows.data(), own, part, op);
      mine.assign(own, own + part);
      require(same_bits(mine, expected_part), "reduce_scatter in place of ", part);
    }
  }
}

/// broadcast, all_gather and all_to_all_v of one element type.
template <class T, class Comm>
void check_moves(Comm& c) {
  const auto make = [](int rank, std::int64_t count, int salt) {
    const auto bytes = values<std::uint64_t>(rank, (count * static_cast<std::int64_t>(sizeof(T)) + 7) / 8, salt);
    std::vector<T> result(static_cast<std::size_t>(count));
    if (count > 0) std::memcpy(result.data(), bytes.data(), result.size() * sizeof(T));
    return result;
  };
  for (const std::int64_t count : {0, 1, 5, 3000}) {
    for (int root = 0; root < c.size(); ++root) {
      std::vector<T> data = make(c.rank(), count, root);
      c.broadcast({}, data.data(), count, root);
      require(same_bits(data, make(root, count, root)), "broadcast of ", count, " from ", root);
    }
    std::vector<T> expected;
    for (int r = 0; r < c.size(); ++r) {
      const auto theirs = make(r, count, 50);
      expected.insert(expected.end(), theirs.begin(), theirs.end());
    }
    const std::vector<T> send = make(c.rank(), count, 50);
    std::vector<T> recv(expected.size());
    c.all_gather({}, send.data(), recv.data(), count);
    require(same_bits(recv, expected), "all_gather of ", count);
    std::vector<T> in_place(expected.size());
    std::copy(send.begin(), send.end(), in_place.begin() + c.rank() * count);
    c.all_gather({}, in_place.data() + c.rank() * count, in_place.data(), count);
    require(same_bits(in_place, expected), "all_gather in place of ", count);
  }
  // Uneven parts with gaps; salt 0 has nobody send anything, salt 1 leaves out a rank.
  for (int salt = 0; salt < 6; ++salt) {
    const auto count_of = [&](int from, int to) -> std::int64_t {
      if (salt == 0 || (salt == 1 && (from == 0 || to == c.size() - 1))) return 0;
      return static_cast<std::int64_t>(value<std::uint64_t>(from, to, salt) % (salt == 2 ? 3000 : 4));
    };
    const auto size = static_cast<std::size_t>(c.size());
    std::vector<std::int64_t> send_counts(size), send_offsets(size), recv_counts(size), recv_offsets(size);
    std::int64_t send_total = 3;
    std::int64_t recv_total = 1;
    for (int r = c.size() - 1; r >= 0; --r) {  // parts lie in descending order: offsets must be obeyed
      const auto k = static_cast<std::size_t>(r);
      send_counts[k] = count_of(c.rank(), r);
      send_offsets[k] = send_total;
      send_total += send_counts[k] + 2;
      recv_counts[k] = count_of(r, c.rank());
      recv_offsets[k] = recv_total;
      recv_total += recv_counts[k] + 3;
    }
    std::vector<T> send = make(99, send_total, 0);
    std::vector<T> recv = make(98, recv_total, 0);
    std::vector<T> expected = recv;
    for (int r = 0; r < c.size(); ++r) {
      const auto k = static_cast<std::size_t>(r);
      const auto out = make(c.rank() * 64 + r, send_counts[k], salt);
      const auto in = make(r * 64 + c.rank(), recv_counts[k], salt);
      std::copy(out.begin(), out.end(), send.begin() + send_offsets[k]);
      std::copy(in.begin(), in.end(), expected.begin() + recv_offsets[k]);
    }
    c.all_to_all_v({}, send.data(), send_counts.data(), send_offsets.data(), recv.data(), recv_counts.data(),
                   recv_offsets.data());
    require(same_bits(recv, expected), "all_to_all_v ", salt);
  }
}

/// Random groups of messages: several per pair, to oneself, of no bytes, with only some ranks taking part.
template <class Comm>
void check_exchange(Comm& c, int rounds) {
  std::mt19937 shared(20260101);  // the same on every rank
  for (int round = 0; round < rounds; ++round) {
    struct message {
      int from, to;
      std::int64_t bytes;
    };
    std::vector<message> messages(shared() % (3u * static_cast<unsigned>(c.size()) + 1));
    for (message& m : messages) {
      m.from = static_cast<int>(shared() % static_cast<unsigned>(c.size()));
      m.to = static_cast<int>(shared() % static_cast<unsigned>(c.size()));
      m.bytes = shared() % 4 == 0 ? 0 : static_cast<std::int64_t>(shared() % (round % 8 == 0 ? 70000 : 50));
    }
    std::vector<std::vector<std::uint64_t>> buffers;
    std::vector<std::vector<std::uint64_t>> expected;
    std::vector<tessera::transfer> sends;
    std::vector<tessera::transfer> receives;
    std::vector<std::vector<std::uint64_t>> sources;
    sources.reserve(messages.size());
    buffers.reserve(messages.size());
    for (std::size_t i = 0; i < messages.size(); ++i) {
      const message& m = messages[i];
      const auto content = values<std::uint64_t>(m.from, m.bytes / 8 + 1, round * 1000 + static_cast<int>(i));
      if (m.from == c.rank()) {
        sources.push_back(content);
        sends.push_back({m.to, m.bytes == 0 ? nullptr : sources.back().data(), m.bytes});
      }
      if (m.to == c.rank()) {
        buffers.emplace_back(content.size(), 0);
        receives.push_back({m.from, m.bytes == 0 ? nullptr : buffers.back().data(), m.bytes});
        expected.push_back(buffers.back());
        std::memcpy(expected.back().data(), content.data(), static_cast<std::size_t>(m.bytes));
      }
    }
    c.exchange({}, sends, receives);
    for (std::size_t i = 0; i < buffers.size(); ++i) require(same_bits(buffers[i], expected[i]), "exchange ", round);
  }
}

/// The k-th send meets the k-th receive, however they are grouped; and a pipeline, where neighbours only meet.
template <class Comm>
void check_order_of_messages(Comm& c) {
  constexpr int num_messages = 12;
  if (c.size() > 1) {
    const int last = c.size() - 1;
    if (c.rank() == 0) {
      for (int i = 0; i < num_messages; i += 3) {  // groups of 3
        const std::array<int, 3> data{i, i + 1, i + 2};
        std::array<tessera::transfer, 3> sends;
        for (std::size_t k = 0; k < 3; ++k) sends[k] = tessera::send_to(last, &data[k], 1);
        c.exchange({}, sends, {});
      }
    } else if (c.rank() == last) {
      for (int i = 0; i < num_messages; i += 4) {  // meet groups of 4
        std::array<int, 4> data{-1, -1, -1, -1};
        std::array<tessera::transfer, 4> receives;
        for (std::size_t k = 0; k < 4; ++k) receives[k] = tessera::receive_from(0, &data[k], 1);
        c.exchange({}, {}, receives);
        for (std::size_t k = 0; k < 4; ++k)
          require(data[k] == i + static_cast<int>(k), "message ", i, " is out of order");
      }
    }
  }
  for (int micro_batch = 0; micro_batch < 20; ++micro_batch) {
    std::int64_t sum = micro_batch;
    if (c.rank() > 0) {
      const tessera::transfer receive = tessera::receive_from(c.rank() - 1, &sum, 1);
      c.exchange({}, {}, {&receive, 1});
    }
    require(sum == micro_batch + std::int64_t{c.rank()} * (c.rank() + 1) / 2 - c.rank(), "pipeline gives ", sum);
    sum += c.rank();
    if (c.rank() + 1 < c.size()) {
      const tessera::transfer send = tessera::send_to(c.rank() + 1, &sum, 1);
      c.exchange({}, {&send, 1}, {});
    }
  }
}

/// Colors, keys, nesting, and use of parent and children in turn.
template <class Comm>
void check_split(Comm& c) {
  const auto members = [](Comm& part, int world_rank) {
    std::vector<int> ranks(static_cast<std::size_t>(part.size()));
    part.all_gather({}, &world_rank, ranks.data(), 1);
    require(ranks[static_cast<std::size_t>(part.rank())] == world_rank, "a rank is not in its place");
    return ranks;
  };
  Comm halves = c.split(c.rank() % 2, -c.rank());  // by parity, in descending order
  std::vector<int> expected;
  for (int r = c.size() - 1; r >= 0; --r) {
    if (r % 2 == c.rank() % 2) expected.push_back(r);
  }
  require(members(halves, c.rank()) == expected, "split by parity");

  Comm same = c.split(7, 0);  // equal keys: ordered by rank
  require(same.size() == c.size() && same.rank() == c.rank(), "split into one");
  Comm alone = c.split(c.rank(), 5);
  require(alone.size() == 1 && alone.rank() == 0, "split into single ranks");
  alone.barrier({});

  Comm quarters = halves.split(halves.rank() / 2, 0);  // pairs within a half
  std::vector<int> pair;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (static_cast<int>(i) / 2 == halves.rank() / 2) pair.push_back(expected[i]);
  }
  require(members(quarters, c.rank()) == pair, "nested split");

  for (int i = 0; i < 5; ++i) {
    std::int64_t sums[3] = {c.rank(), c.rank(), c.rank()};
    halves.all_reduce({}, &sums[0], &sums[0], 1);
    c.all_reduce({}, &sums[1], &sums[1], 1);
    quarters.all_reduce({}, &sums[2], &sums[2], 1);
    std::int64_t wanted[3] = {0, std::int64_t{c.size()} * (c.size() - 1) / 2, 0};
    for (const int r : expected) wanted[0] += r;
    for (const int r : pair) wanted[2] += r;
    require(std::equal(sums, sums + 3, wanted), "sums over parent and children");
  }
  const auto error = caught<tessera::invalid_argument>([&] { c.split(c.rank() == c.size() - 1 ? -3 : 0, 0); });
  require(std::string(error.what()).find("color = -3") != std::string::npos, error.what());
  c.barrier({});
}

/// `count` elements of global chunk `chunk`.
template <class A>
std::vector<A> chunk_values(std::int64_t chunk, std::int64_t count) {
  return values<A>(static_cast<int>(chunk), count, 4242);
}

/// The ordered sum of this rank's `[first, first + local)` of the global chunks.
template <class A, class Comm>
std::vector<A> ordered_sum(Comm& c, std::int64_t first, std::int64_t local, std::int64_t total, std::int64_t count) {
  std::vector<A> contributions;
  for (std::int64_t chunk = first; chunk < first + local; ++chunk) {
    const auto more = chunk_values<A>(chunk, count);
    contributions.insert(contributions.end(), more.begin(), more.end());
  }
  std::vector<A> result(static_cast<std::size_t>(count), A{-1});
  tessera::host_buffer workspace(tessera::ordered_all_reduce_workspace_bytes<A>(c.size(), total, count));
  tessera::ordered_all_reduce({}, c, contributions.data(), local, count, result.data(),
                              tessera::workspace_memory(workspace));
  return result;
}

/// Ordered sums over even, lopsided and random divisions of the chunks are the sum by definition, bit by bit.
template <class A, class Comm>
void check_ordered_reduce(Comm& c) {
  std::mt19937 shared(7);
  for (const std::int64_t total : {0, 1, 5, 12}) {
    for (const std::int64_t count : {0, 1, 3, 100, 2500}) {
      std::vector<A> expected(static_cast<std::size_t>(count), A{0});
      for (std::int64_t chunk = 0; chunk < total; ++chunk) {
        const auto next = chunk_values<A>(chunk, count);
        for (std::size_t i = 0; i < next.size(); ++i) expected[i] = chunk == 0 ? next[i] : expected[i] + next[i];
      }
      for (int division = 0; division < 4; ++division) {
        std::vector<std::int64_t> bounds(static_cast<std::size_t>(c.size()) + 1, 0);
        for (int r = 1; r < c.size(); ++r) {
          auto& bound = bounds[static_cast<std::size_t>(r)];
          if (division == 0) bound = total * r / c.size();
          if (division == 1) bound = 0;      // all on the last rank
          if (division == 2) bound = total;  // all on the first rank
          if (division == 3) bound = static_cast<std::int64_t>(shared() % static_cast<unsigned>(total + 1));
        }
        bounds.back() = total;
        std::sort(bounds.begin(), bounds.end());
        const std::int64_t first = bounds[static_cast<std::size_t>(c.rank())];
        const std::int64_t local = bounds[static_cast<std::size_t>(c.rank()) + 1] - first;
        require(same_bits(ordered_sum<A>(c, first, local, total, count), expected), "ordered sum of ", total,
                " chunks of ", count, " elements, division ", division);
      }
    }
  }
}

/// Wrong arguments throw on this rank, nothing is sent, and the communicator goes on.
template <class Comm>
void check_bad_arguments(Comm& c) {
  using tessera::invalid_argument;
  using tessera::transfer;
  const auto says = [](const invalid_argument& e, const char* text) {
    require(std::string(e.what()).find(text) != std::string::npos, "the message does not say '", text, "': ", e.what());
  };
  std::vector<double> data(64 * static_cast<std::size_t>(c.size()) + 64);
  double* p = data.data();
  double* none = nullptr;
  const volatile std::int64_t huge = std::int64_t{1} << 60;  // volatile: compilers warn of what is refused here
  const transfer to_nobody{c.size(), p, 8};
  const transfer to_negative{-1, p, 8};
  const transfer negative{0, p, -8};
  const transfer without_data{0, nullptr, 8};
  const transfer to_self{c.rank(), p, 8};
  const transfer from_self{c.rank(), p + 8, 16};
  says(caught<invalid_argument>([&] { c.exchange({}, {&to_nobody, 1}, {}); }), "is not a rank");
  says(caught<invalid_argument>([&] { c.exchange({}, {}, {&to_negative, 1}); }), "receives = -1");
  says(caught<invalid_argument>([&] { c.exchange({}, {&negative, 1}, {}); }), "-8 bytes");
  says(caught<invalid_argument>([&] { c.exchange({}, {}, {&without_data, 1}); }), "without data");
  says(caught<invalid_argument>([&] {
         c.exchange({}, {&to_self, 1}, {&from_self, 1});
       }),
       "itself 8 bytes and receive 16");
  says(caught<invalid_argument>([&] { c.exchange({}, {&to_self, 1}, {}); }), "itself 8 bytes and receive 0");
  says(caught<invalid_argument>([&] { c.exchange({}, {}, {&from_self, 1}); }), "does not send");
  says(caught<invalid_argument>([&] { c.broadcast({}, p, 1, c.size()); }), "root");
  says(caught<invalid_argument>([&] { c.broadcast({}, p, -1, 0); }), "count = -1");
  says(caught<invalid_argument>([&] { c.broadcast({}, none, 1, 0); }), "no data");
  says(caught<invalid_argument>([&] { c.all_reduce({}, none, p, 3); }), "send of 3 elements");
  says(caught<invalid_argument>([&] { c.all_reduce({}, p, p + 1, 3); }), "overlaps");
  says(caught<invalid_argument>([&] { c.all_gather({}, p, none, 3); }), "recv of 3 elements");
  says(caught<invalid_argument>([&] { c.all_gather({}, p, p + 1, huge); }), "must be in");
  says(caught<invalid_argument>([&] { c.reduce_scatter({}, p, p + 1 + c.rank() * 2, 2); }), "overlaps");
  const std::vector<std::int64_t> ones(static_cast<std::size_t>(c.size()), 1);
  const std::vector<std::int64_t> minus(static_cast<std::size_t>(c.size()), -1);
  const std::int64_t* one = ones.data();
  says(caught<invalid_argument>([&] { c.all_to_all_v({}, p, one, minus.data(), p + 9, one, one); }), "offsets");
  says(caught<invalid_argument>([&] { c.all_to_all_v({}, p, minus.data(), one, p + 9, one, one); }), "count = -1");
  says(caught<invalid_argument>([&] { c.all_to_all_v({}, p, nullptr, one, p + 9, one, one); }), "is null");
  c.barrier({});
}

/// Everything above.
template <class Comm>
void check_all(Comm& c) {
  for (int i = 0; i < 10; ++i) c.barrier({});
  check_reductions<float>(c);
  check_reductions<double>(c);
  check_reductions<std::int32_t>(c);
  check_reductions<std::int64_t>(c);
  check_reductions<std::uint64_t>(c);
  check_moves<std::uint8_t>(c);
  check_moves<tessera::bfloat16>(c);
  check_moves<std::array<std::int32_t, 3>>(c);
  check_exchange(c, 40);
  check_order_of_messages(c);
  check_split(c);
  check_ordered_reduce<float>(c);
  check_ordered_reduce<double>(c);
  check_bad_arguments(c);
}

/// No rank passes a barrier before all have come; counted by `arrive()`, which returns how many have.
template <class Comm, class Arrive>
void check_barrier(Comm& c, Arrive arrive) {
  for (int round = 1; round <= 50; ++round) {
    arrive();
    c.barrier({});
    const std::int64_t arrived = arrive.count();
    require(arrived >= std::int64_t{round} * c.size(), "a rank passed barrier ", round, " after ", arrived,
            " arrivals");
    c.barrier({});
  }
}

/// Floating-point results of this rank, to be compared between communicators bit by bit.
template <class Comm>
std::vector<double> results(Comm& c) {
  std::vector<double> all;
  for (const std::int64_t count : {3, 500, 30011}) {
    const auto send = values<double>(c.rank(), count, 9);
    const auto send_float = values<float>(c.rank(), count * c.size(), 9);
    std::vector<double> recv(send.size());
    std::vector<float> recv_float(send.size());
    c.all_reduce({}, send.data(), recv.data(), count);
    all.insert(all.end(), recv.begin(), recv.end());
    c.reduce_scatter({}, send_float.data(), recv_float.data(), count);
    all.insert(all.end(), recv_float.begin(), recv_float.end());
    c.all_reduce({}, send_float.data(), recv_float.data(), count);
    all.insert(all.end(), recv_float.begin(), recv_float.end());
  }
  const auto sum = ordered_sum<double>(c, 3 * c.rank(), 3, 3 * c.size(), 700);
  all.insert(all.end(), sum.begin(), sum.end());
  return all;
}

}  // namespace comm_checks
