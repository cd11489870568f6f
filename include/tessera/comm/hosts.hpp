// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A communicator that knows which of its ranks share a host.

#include <optional>
#include <utility>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace comm {

/// A communicator of GPUs on several hosts, G on each: rank r is number `r % G` of host `r / G`. It does everything
/// that `Comm` does; a dispatch over it takes each row over the network once per host and hands it on inside the host,
/// by two communicators that are split off here. With `combine::ordered` pairs go home straight. Failures of one are
/// failures of all, where `Comm` has it so.
/// @tparam Comm A communicator of device memory: `comm::nccl`.
template <device_communicator Comm>
class hosts : public Comm {
 public:
  /// Collective. @param over Its ranks; a handle is kept. @param ranks_per_host G, the same on all ranks, divides their
  /// number. @throws invalid_argument if it does not, and what `Comm::split` throws.
  static hosts create(Comm over, int ranks_per_host) {
    TESSERA_EXPECTS(ranks_per_host >= 1 && over.size() % ranks_per_host == 0,
                    "comm::hosts: " << over.size() << " ranks do not fill hosts of " << ranks_per_host << " ranks");
    hosts made(std::move(over), ranks_per_host);
    if (made.ranks_per_host() == made.size()) return made;
    made.within_.emplace(made.Comm::split(made.rank() / ranks_per_host, made.rank()));
    made.across_.emplace(made.Comm::split(made.rank() % ranks_per_host, made.rank()));
    return made;
  }

  /// G; the number of ranks where nothing is gained by two levels, which is with one host and with one rank on each.
  int ranks_per_host() const noexcept { return ranks_per_host_; }
  /// The communicator itself.
  Comm& over() noexcept { return *this; }
  /// The ranks of this host, in order. Only with several hosts of several ranks.
  Comm& within_host() { return *within_; }
  /// The ranks of this number on all hosts, in order. Only with several hosts of several ranks.
  Comm& across_hosts() { return *across_; }

  /// Collective: as `Comm::split`; the new communicator says nothing about hosts. @param color Not negative.
  /// @param key Any.
  hosts split(int color, int key) {
    Comm part = Comm::split(color, key);
    const int size = part.size();
    return hosts(std::move(part), size);
  }

 private:
  hosts(Comm over, int ranks_per_host)
      : Comm(std::move(over)), ranks_per_host_(ranks_per_host == 1 ? this->size() : ranks_per_host) {}

  int ranks_per_host_;
  std::optional<Comm> within_, across_;
};

}  // namespace comm

TESSERA_NAMESPACE_END
