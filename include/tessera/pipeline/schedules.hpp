// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The library's schedules by name, for command lines.

#include <string_view>

#include <tessera/pipeline/dualpipe.hpp>
#include <tessera/pipeline/dualpipev.hpp>
#include <tessera/pipeline/one_f_one_b.hpp>
#include <tessera/pipeline/zb1p.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// The names that `named_schedule` knows.
inline constexpr std::string_view schedule_names[] = {"1f1b", "zb1p", "dualpipe", "dualpipev"};

/// A schedule by name, by its number of stages: DualPipeV has two stages on every rank, the others one rank for each
/// stage. Host: returns when done.
/// @param name              One of `schedule_names`.
/// @param num_stages        Stages that every micro-batch passes; even for DualPipeV.
/// @param num_micro_batches M.
/// @throws invalid_argument for other names, and for sizes that the schedule does not have.
inline schedule named_schedule(std::string_view name, int num_stages, int num_micro_batches) {
  if (name == "1f1b") return one_f_one_b(num_stages, num_micro_batches);
  if (name == "zb1p") return zb1p(num_stages, num_micro_batches);
  if (name == "dualpipe") return dualpipe(num_stages, num_micro_batches);
  TESSERA_EXPECTS(name == "dualpipev",
                  "there is no schedule '" << name << "'; right is 1f1b, zb1p, dualpipe or dualpipev");
  TESSERA_EXPECTS(num_stages >= 2 && num_stages % 2 == 0,
                  "DualPipeV: num_stages = " << num_stages << "; right is an even number, two stages on every rank");
  return dualpipev(num_stages / 2, num_micro_batches);
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
