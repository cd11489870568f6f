// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of timeline_svg.hpp.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <locale>
#include <sstream>
#include <string>

#include <tessera/pipeline/timeline_svg.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline::detail {

/// Fill of a box: the rank's first chunk, or a later one.
struct fill_pair {
  const char* first;
  const char* later;
};
inline constexpr fill_pair forward_fill = {"#f5b041", "#b9650b"};
inline constexpr fill_pair backward_fill = {"#82c96b", "#2f7d32"};
inline constexpr fill_pair input_fill = {"#b5e2a3", "#5a9e4b"};
inline constexpr fill_pair weights_fill = {"#85c1f5", "#2a6cb0"};

inline fill_pair fill_of(action_kind kind) {
  switch (kind) {
    case action_kind::forward:
      return forward_fill;
    case action_kind::backward_input:
      return input_fill;
    case action_kind::backward_weights:
      return weights_fill;
    default:
      return backward_fill;
  }
}

/// The text with the five characters that XML reserves replaced.
inline std::string xml_text(const std::string& text) {
  std::string safe;
  for (const char c : text) {
    switch (c) {
      case '&':
        safe += "&amp;";
        break;
      case '<':
        safe += "&lt;";
        break;
      case '>':
        safe += "&gt;";
        break;
      case '"':
        safe += "&quot;";
        break;
      case '\'':
        safe += "&#39;";
        break;
      default:
        safe += c;
    }
  }
  return safe;
}

/// One drawing.
class svg_writer {
 public:
  svg_writer(const schedule& s, const timeline& t, const svg_options& options) : s_(s), t_(t), options_(options) {
    svg_.imbue(std::locale::classic());
    svg_.setf(std::ios::fixed);
    svg_.precision(2);
    std::int64_t shortest = 0;
    for (std::size_t rank = 0; rank < s.actions.size(); ++rank) {
      for (std::size_t i = 0; i < s.actions[rank].size(); ++i) {
        const std::int64_t length = t.intervals[rank][i].end - t.intervals[rank][i].begin;
        if (s.actions[rank][i].kind == action_kind::overlapped) legend_width_ = 920;
        if (is_communication(s.actions[rank][i].kind) || length <= 0) continue;
        shortest = shortest == 0 ? length : std::min(shortest, length);
      }
    }
    const auto total = static_cast<double>(std::max<std::int64_t>(t.makespan, 1));
    scale_ = std::min(options.box_width / static_cast<double>(std::max<std::int64_t>(shortest, 1)),
                      options.max_width / total);
    width_ = total * scale_;
  }

  std::string draw() {
    begin();
    for (int rank = 0; rank < s_.num_ranks; ++rank) row(rank);
    axis();
    legend();
    svg_ << "</svg>\n";
    return svg_.str();
  }

 private:
  static constexpr double left = 64, top = 34, right = 84, below = 78;

  double x(std::int64_t time) const { return left + static_cast<double>(time) * scale_; }
  double y(int rank) const { return top + rank * options_.row_height; }
  double bottom() const { return y(s_.num_ranks); }

  void begin() {
    const double w = std::max(left + width_ + right, legend_width_), h = bottom() + below;
    svg_ << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << w << "\" height=\"" << h << "\" viewBox=\"0 0 " << w
         << ' ' << h << "\" font-family=\"Helvetica,Arial,sans-serif\" font-size=\"12\">\n"
         << "<defs><pattern id=\"idle\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" "
            "patternTransform=\"rotate(45)\"><rect width=\"6\" height=\"6\" fill=\"#f4f4f4\"/><line x1=\"0\" y1=\"0\" "
            "x2=\"0\" y2=\"6\" stroke=\"#d0d0d0\" stroke-width=\"1.5\"/></pattern></defs>\n"
         << "<style>.box{stroke:#333;stroke-width:.8}.half{stroke:none}.n{text-anchor:middle;fill:#111}"
            ".m{text-anchor:middle;fill:#fff}.r{text-anchor:end;font-weight:bold}</style>\n"
         << "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
         << "<text x=\"" << left << "\" y=\"20\" font-size=\"14\" font-weight=\"bold\">" << xml_text(s_.name) << ": "
         << s_.num_ranks << " ranks, " << s_.num_stages << " stages, " << s_.num_micro_batches
         << " micro-batches</text>\n"
         << "<text x=\"" << left + width_ + 8 << "\" y=\"" << top - 5 << "\" font-size=\"11\">idle / live</text>\n";
  }

  void row(int rank) {
    const auto r = static_cast<std::size_t>(rank);
    const double h = options_.row_height;
    svg_ << "<text class=\"r\" x=\"" << left - 8 << "\" y=\"" << y(rank) + h / 2 + 4 << "\">Rank " << rank
         << "</text>\n"
         << "<rect class=\"box\" x=\"" << left << "\" y=\"" << y(rank) << "\" width=\"" << width_ << "\" height=\"" << h
         << "\" fill=\"url(#idle)\"/>\n";
    for (std::size_t i = 0; i < s_.actions[r].size(); ++i) {
      const interval when = t_.intervals[r][i];
      if (when.end <= when.begin) continue;
      if (is_communication(s_.actions[r][i].kind)) {
        // All messages of a batch have its times: one bar.
        if (i == 0 || t_.intervals[r][i - 1] != when) communication(rank, when);
      } else {
        computation(rank, s_.actions[r][i], when);
      }
    }
    svg_ << "<text x=\"" << left + width_ + 8 << "\" y=\"" << y(rank) + h / 2 + 4 << "\">" << t_.idle[r] << " / "
         << t_.live_activations[r] << "</text>\n";
  }

  void communication(int rank, const interval& when) {
    svg_ << "<rect x=\"" << x(when.begin) << "\" y=\"" << y(rank) + options_.row_height * 0.38 << "\" width=\""
         << x(when.end) - x(when.begin) << "\" height=\"" << options_.row_height * 0.24 << "\" fill=\"#777\"/>\n";
  }

  void computation(int rank, const action& a, const interval& when) {
    const double begin = x(when.begin), w = x(when.end) - begin;
    svg_ << "<g><title>" << xml_text(to_string(a)) << ", rank " << rank << ", " << when.begin << " to " << when.end
         << "</title>";
    if (a.kind == action_kind::overlapped) {
      const double f = w * options_.forward_share;
      part("half", forward_fill, begin, y(rank), f, a.chunk, a.micro_batch);
      part("half", backward_fill, begin + f, y(rank), w - f, a.backward_chunk, a.backward_micro_batch);
      svg_ << "<rect class=\"box\" x=\"" << begin << "\" y=\"" << y(rank) << "\" width=\"" << w << "\" height=\""
           << options_.row_height << "\" fill=\"none\"/>";
    } else {
      part("box", fill_of(a.kind), begin, y(rank), w, a.chunk, a.micro_batch);
    }
    svg_ << "</g>\n";
  }

  void part(const char* style, fill_pair fill, double begin, double above, double w, int chunk, int micro_batch) {
    svg_ << "<rect class=\"" << style << "\" x=\"" << begin << "\" y=\"" << above << "\" width=\"" << w
         << "\" height=\"" << options_.row_height << "\" fill=\"" << (chunk == 0 ? fill.first : fill.later) << "\"/>";
    const std::string number = std::to_string(micro_batch);
    if (static_cast<double>(number.size()) * 6.8 + 1 > w) return;
    svg_ << "<text class=\"" << (chunk == 0 ? 'n' : 'm') << "\" x=\"" << begin + w / 2 << "\" y=\""
         << above + options_.row_height / 2 + 4 << "\">" << number << "</text>";
  }

  void axis() {
    std::int64_t step = 1;  // 1, 2, 5, 10, ...: at least 60 pixels
    for (int i = 0; static_cast<double>(step) * scale_ < 60; ++i) step = i % 3 == 1 ? step / 2 * 5 : step * 2;
    svg_ << "<text class=\"r\" x=\"" << left - 8 << "\" y=\"" << bottom() + 17 << "\">Time</text>\n";
    for (std::int64_t time = 0; time <= t_.makespan; time += step) {
      svg_ << "<line x1=\"" << x(time) << "\" y1=\"" << bottom() << "\" x2=\"" << x(time) << "\" y2=\"" << bottom() + 5
           << "\" stroke=\"#333\"/><text class=\"n\" x=\"" << x(time) << "\" y=\"" << bottom() + 17
           << "\" font-size=\"11\">" << time << "</text>\n";
    }
  }

  void legend() {
    bool used[5] = {}, later = false, talks = false;
    for (int rank = 0; rank < s_.num_ranks; ++rank) {
      const auto r = static_cast<std::size_t>(rank);
      for (std::size_t i = 0; i < s_.actions[r].size(); ++i) {
        const action& a = s_.actions[r][i];
        if (is_communication(a.kind)) {
          talks = talks || t_.intervals[r][i].end > t_.intervals[r][i].begin;
        } else {
          used[static_cast<std::size_t>(a.kind)] = true;
          later = later || a.chunk > 0;
        }
      }
    }
    const double above = bottom() + 34;
    double at = left;
    const auto entry = [&](double w, const char* text, auto&& box) {
      box();
      svg_ << "<text x=\"" << at + w + 6 << "\" y=\"" << above + 13 << "\">" << xml_text(text) << "</text>\n";
      at += w + 26 + 6.2 * static_cast<double>(std::string(text).size());
    };
    const auto rect = [&](const char* style, double from, double w, const char* fill) {
      svg_ << "<rect class=\"" << style << "\" x=\"" << from << "\" y=\"" << above << "\" width=\"" << w
           << "\" height=\"18\" fill=\"" << fill << "\"/>";
    };
    const char* names[] = {"Forward", "Backward", "Backward for input", "Backward for weights",
                           "Overlapped forward & backward"};
    for (std::size_t kind = 0; kind < 4; ++kind) {
      if (!used[kind]) continue;
      entry(kind == 1 ? 32 : 18, names[kind],
            [&] { rect("box", at, kind == 1 ? 32 : 18, fill_of(static_cast<action_kind>(kind)).first); });
    }
    if (used[4]) {
      entry(48, names[4], [&] {
        rect("half", at, 16, forward_fill.first);
        rect("half", at + 16, 32, backward_fill.first);
        rect("box", at, 48, "none");
      });
    }
    entry(18, "Idle", [&] { rect("box", at, 18, "url(#idle)"); });
    if (talks) entry(18, "Communication", [&] { rect("half", at, 18, "#777"); });
    at = left;
    if (later) {
      svg_ << "<text x=\"" << at << "\" y=\"" << above + 36
           << "\">Dark boxes: the rank&#39;s second stage. Numbers: micro-batches.</text>\n";
    }
  }

  const schedule& s_;
  const timeline& t_;
  const svg_options& options_;
  std::ostringstream svg_;
  double scale_ = 1;
  double width_ = 0;
  double legend_width_ = 680;  ///< Room for its entries.
};

}  // namespace pipeline::detail

namespace pipeline {

inline std::string timeline_svg(const schedule& s, const timeline& t, const svg_options& options) {
  TESSERA_EXPECTS(options.box_width > 0 && options.row_height > 0 && options.max_width > 0 &&
                      options.forward_share >= 0 && options.forward_share <= 1,
                  "timeline_svg: box_width = " << options.box_width << ", row_height = " << options.row_height
                                               << ", max_width = " << options.max_width
                                               << " must be positive, forward_share = " << options.forward_share
                                               << " in [0, 1]");
  bool fits = t.intervals.size() == s.actions.size() && s.actions.size() == static_cast<std::size_t>(s.num_ranks) &&
              t.idle.size() == s.actions.size() && t.live_activations.size() == s.actions.size();
  for (std::size_t rank = 0; fits && rank < s.actions.size(); ++rank) {
    fits = t.intervals[rank].size() == s.actions[rank].size();
  }
  TESSERA_EXPECTS(fits, "timeline_svg: the timeline is not one of schedule '" << s.name
                                                                              << "'; give what simulate(...) "
                                                                                 "returned for it");
  return detail::svg_writer(s, t, options).draw();
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
