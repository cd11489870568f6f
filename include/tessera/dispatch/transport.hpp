// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Transports: how rows travel between the GPUs of a host. Token t of rank s stands in row `s * max_tokens + t` of what
/// arrives, whatever the transport, so that lists, experts and sums are the same, bit by bit; only time, SMs and bytes
/// differ. `transport_cost.hpp` says how much.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <iosfwd>
#include <string>

#include <tessera/core/error.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/dispatch/transport_cost.hpp>

TESSERA_NAMESPACE_BEGIN

/// Transport policies.
namespace transport {

/// A row goes once to each rank that owns one of its experts; sums go home as soon as an owner has made them. The
/// fewest bytes, and the least time unless there is computation to hide another's.
struct all_to_all {
  /// Whether this rank's own rows of a dispatch are copied by a copy engine beside the kernel, which then needs fewer
  /// SMs. All tokens are copied, the communicator has one stream of copies or more, and `dispatch_end` is told, too.
  bool copies_own_rows = false;
};

/// Every row goes to every rank, so that a dispatch needs no routing and may begin before there is one: under the
/// router. On the way home it is `all_to_all`: an owner sends sums of tokens that have an expert there, and no zeros in
/// place of the others, as a reduce-scatter of dense rows would.
struct all_gather {};

/// Every row goes to every rank by copies in streams of the communicator, which take no SMs; kernels of one warp post
/// and await flags around them. On the way home kernels add up an owner's rows, chunk by chunk of tokens, copies bring
/// all of a chunk's rows, and kernels add them to home's. The kernels that add up take the SMs of the communicator's
/// handle, all of them if it has no number.
///
/// Like `all_gather` a dispatch needs no routing. Its `x` stays as it is until `dispatch_end`; begin and end are in one
/// graph capture. A copy cannot be called off: after a failure of this rank, and until `reset`, copies still write to
/// peers, who may not have read yet what stood there. No flag follows them, so that the peer's operation fails in turn.
struct copy_engines {
  /// Of the communicator's `symmetric_options::copy_streams`, those of copies to peers; own rows of a dispatch take one
  /// more. More than one are slower between 4 GPUs behind NVSwitch, though each then serves a peer of its own: 834 us
  /// with three against 496 for a dispatch of 4096 tokens of 14336 bytes (bench/results/gpu_ranks_4.json). Only combine
  /// gains, up to 1024 tokens: 98 us against 117 for 128, 271 against 291 for 1024.
  int streams = 1;
  int chunks = 4;  ///< Of tokens, on the way home; the same on all ranks.
};

class automatic;

}  // namespace transport

/// A transport policy: `transport::all_to_all`, `all_gather` or `copy_engines`, or `transport::automatic`, which is one
/// of them chosen at run time.
template <class T>
concept transport_policy = std::same_as<T, transport::all_to_all> || std::same_as<T, transport::all_gather> ||
    std::same_as<T, transport::copy_engines> || std::same_as<T, transport::automatic>;

namespace transport {

/// A transport for dispatch and one for combine, chosen when this is made: by the caller, or by the cost model from
/// bounds that the host knows. The same on all ranks if they give the same numbers.
class automatic {
 public:
  /// `all_to_all`.
  automatic() = default;
  /// Both ways the given one. @param which Its options are kept.
  automatic(all_to_all which)  // NOLINT: meant to be implicit
      : sends_(which) {}
  /// Both ways the given one.
  automatic(all_gather)  // NOLINT: meant to be implicit
      : dispatch_(transport_kind::all_gather), combine_(transport_kind::all_gather) {}
  /// Both ways the given one. @param which Its options are kept.
  automatic(copy_engines which)  // NOLINT: meant to be implicit
      : copies_(which), dispatch_(transport_kind::copy_engines), combine_(transport_kind::copy_engines) {}
  /// Another each way, such as dispatch by copies, which takes no SMs from products beside it, and combine by
  /// `all_to_all`, which keeps to a few. @param there Of rows to the owners of experts. @param home Of rows home. Their
  /// options are kept.
  template <transport_policy There, transport_policy Home>
  requires(!std::same_as<There, Home>) automatic(There there, Home home)
      : dispatch_(keep(there)), combine_(keep(home)) {}
  /// Each way the one that costs least; of equals the first of `transport_kind`. @param c Sizes. @param machine
  /// Constants.
  explicit automatic(const transport_case& c, const transport_machine& machine = {})
      : copies_{c.copy_streams, c.chunks}, chosen_(true), case_(c), machine_(machine) {
    for (int k = 1; k < num_transport_kinds; ++k) {
      const auto kind = static_cast<transport_kind>(k);
      if (dispatch_time(kind, c, machine).cost_us < dispatch_time(dispatch_, c, machine).cost_us) dispatch_ = kind;
      if (combine_time(kind, c, machine).cost_us < combine_time(combine_, c, machine).cost_us) combine_ = kind;
    }
  }

  /// Of rows to the owners of experts.
  transport_kind dispatch() const noexcept { return dispatch_; }
  /// Of rows home.
  transport_kind combine() const noexcept { return combine_; }
  /// Options of `all_to_all`.
  const all_to_all& sends() const noexcept { return sends_; }
  /// Options of `copy_engines`.
  const copy_engines& copies() const noexcept { return copies_; }

  /// The choice and, where it was made here, what it was made from.
  std::string explain() const {
    using tessera::detail::message;
    if (!chosen_) {
      const bool same = dispatch_ == combine_;
      return (message() << "transport: " << (same ? "" : "dispatch by ") << (same ? "" : name_of(dispatch_))
                        << (same ? "" : ", combine by ") << name_of(combine_) << ", as asked for")
          .text();
    }
    const transport_case& c = case_;
    char line[160];
    std::snprintf(line, sizeof(line), "%.1f", c.compute_us);
    std::string text =
        (message() << "transport: dispatch by " << name_of(dispatch_) << ", combine by " << name_of(combine_) << "\n"
                   << c.num_ranks << " ranks, " << c.top_k << " of " << c.num_experts << " experts, " << c.num_tokens
                   << " tokens of " << c.row_bytes << " bytes, " << c.dispatch_sms << " and " << c.combine_sms
                   << " SMs, " << line << " us of computation beside each way\n"
                   << "               dispatch us    MB out   cost us | combine us    MB out   cost us\n")
            .text();
    for (int k = 0; k < num_transport_kinds; ++k) {
      const auto kind = static_cast<transport_kind>(k);
      const auto there = dispatch_time(kind, c, machine_);
      const auto home = combine_time(kind, c, machine_);
      std::snprintf(line, sizeof(line), "%-14s%12.1f%10.1f%10.1f |%11.1f%10.1f%10.1f\n", name_of(kind), there.us,
                    there.wire_bytes * 1e-6, there.cost_us, home.us, home.wire_bytes * 1e-6, home.cost_us);
      text += line;
    }
    return text;
  }
  /// As `explain`. @param out Where to. @param t What.
  template <class Traits>
  friend std::basic_ostream<char, Traits>& operator<<(std::basic_ostream<char, Traits>& out, const automatic& t) {
    return out << t.explain();
  }

 private:
  transport_kind keep(all_to_all which) {
    sends_ = which;
    return transport_kind::all_to_all;
  }
  static transport_kind keep(all_gather) { return transport_kind::all_gather; }
  transport_kind keep(copy_engines which) {
    copies_ = which;
    return transport_kind::copy_engines;
  }

  all_to_all sends_{};  // the kinds' initialisers write these two
  copy_engines copies_{};
  bool chosen_ = false;
  transport_kind dispatch_ = transport_kind::all_to_all;
  transport_kind combine_ = transport_kind::all_to_all;
  transport_case case_{};
  transport_machine machine_{};
};

}  // namespace transport

/// Rows of the scratch of a combine of expert rows, `[rows, d]`: sums on their way to each peer, and none unless copy
/// engines bring them. @param transport Any policy. @param bounds Of the dispatch.
inline std::int64_t outgoing_rows(const transport::automatic& transport, const dispatch_bounds& bounds) {
  return transport.combine() == transport_kind::copy_engines ? (bounds.num_ranks - 1) * bounds.max_tokens : 0;
}

/// Streams of copies that a communicator must have, `symmetric_options::copy_streams`, for both ways.
/// @param transport Any policy.
inline int copy_streams_of(const transport::automatic& transport) {
  int streams = 0;
  if (transport.dispatch() == transport_kind::all_to_all && transport.sends().copies_own_rows) streams = 1;
  if (transport.dispatch() == transport_kind::copy_engines) streams = transport.copies().streams + 1;
  if (transport.combine() == transport_kind::copy_engines) streams = std::max(streams, transport.copies().streams);
  return streams;
}

TESSERA_NAMESPACE_END
