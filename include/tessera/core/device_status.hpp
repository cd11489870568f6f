// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a kernel found wrong with its input. Kernels cannot throw: they make the result safe, write a status word in
/// device memory and go on. The caller copies the word to the host when it suits and asks `expect_ok`.

#include <cstdint>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// What was wrong.
enum class device_fault : std::int32_t {
  none = 0,               ///< Nothing.
  logit_not_finite,       ///< A logit is NaN or infinite: the token got no experts.
  key_not_finite,         ///< A bias, or a score of a user's, made a key NaN: the token got no experts.
  expert_out_of_range,    ///< A given expert id is outside [0, E): the slot was left unused.
  expert_repeated,        ///< A token was given the same expert twice: the later slot was left unused.
  token_id_out_of_range,  ///< A token id is outside the table of `select::hash`: the token got no experts.
  too_few_experts,        ///< Fewer than K scores are above -inf: the slots that remained were left unused.
  too_many_pairs,         ///< More pairs than `row_bound`: those beyond it in the order (token, k) were dropped.
};

/// The first fault that was seen since the word was cleared. Zero-filled memory is a cleared word.
struct device_status {
  device_fault fault = device_fault::none;  ///< What was wrong.
  std::int32_t token = 0;                   ///< Token it was seen at; of `too_many_pairs` how many there were.
  std::int32_t expert = 0;  ///< Expert id, or the token id, that was wrong, or the bound; 0 where none is meant.
};

/// Throws where a kernel saw a fault. @param status A copy on the host, made after the kernels were done.
/// @throws invalid_argument naming token and expert; error where pairs were more than the bound.
inline void expect_ok(const device_status& status) {
  TESSERA_EXPECTS_AS(error, status.fault != device_fault::too_many_pairs,
                     "dispatch on the device: " << status.token << " pairs, the bound is " << status.expert
                                                << ": raise dispatch_options::row_bound to " << status.token
                                                << " or more, or choose overflow_policy::drop");
  const auto text = [&]() -> const char* {
    switch (status.fault) {
      case device_fault::none:
        return "";
      case device_fault::logit_not_finite:
        return "a logit is not finite";
      case device_fault::key_not_finite:
        return "a bias or a score is not a number";
      case device_fault::expert_out_of_range:
        return "an expert id is outside [0, num_experts)";
      case device_fault::expert_repeated:
        return "an expert id is given twice";
      case device_fault::token_id_out_of_range:
        return "a token id is outside the table's vocabulary";
      case device_fault::too_few_experts:
        return "the scores leave fewer than top_k experts above -inf";
      case device_fault::too_many_pairs:
        return "";
    }
    return "an unknown fault";
  };
  TESSERA_EXPECTS(status.fault == device_fault::none, "router on the device, token "
                                                          << status.token << ", expert or id " << status.expert << ": "
                                                          << text());
}

TESSERA_NAMESPACE_END
