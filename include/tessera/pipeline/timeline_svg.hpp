// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Draws a timeline, as the papers do: a row for each rank, a box for each computation.

#include <string>

#include <tessera/core/config.hpp>
#include <tessera/pipeline/schedule.hpp>
#include <tessera/pipeline/simulator.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// How a timeline is drawn. Lengths are in pixels.
struct svg_options {
  double box_width = 22;           ///< Of the shortest computation, as long as the picture stays below `max_width`.
  double row_height = 24;          ///< Of a rank's row.
  double max_width = 20000;        ///< Of the rows; boxes become narrower to keep it.
  double forward_share = 1.0 / 3;  ///< Part of an overlapped pair's box that is drawn as its forward: F / (F + B).
};

/// The timeline as an SVG document. Boxes hold the number of the micro-batch: orange for a forward, green for a
/// backward or its input part, blue for the weight part, orange and green for an overlapped pair; darker with white
/// numbers where the rank's second chunk computes. Idle time is hatched; under it, grey bars are batches of
/// communication that hold up the rank. At the right: idle time and most live activations of each rank. Every box tells
/// its action and times when pointed at. Host: returns when done.
/// @param s       The schedule.
/// @param t       What `simulate` returned for it.
/// @param options How to draw.
/// @throws invalid_argument if the timeline is not one of this schedule, or a length is not positive.
std::string timeline_svg(const schedule& s, const timeline& t, const svg_options& options = {});

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/timeline_svg.hpp>
