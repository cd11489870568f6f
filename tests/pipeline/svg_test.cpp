// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/pipeline/schedules.hpp>
#include <tessera/pipeline/timeline_svg.hpp>

namespace ts = tessera;
namespace pipeline = tessera::pipeline;

namespace {

struct element {
  std::string name;
  std::map<std::string, std::string> attributes;
  std::string text;
  std::size_t parent = 0;  // index of the element that holds it
  double number(const char* attribute) const { return std::atof(attributes.at(attribute).c_str()); }
};

// The elements of a document in order; refuses what is not well-formed XML of the simple kind that is written here.
std::vector<element> parse(const std::string& xml) {
  std::vector<element> all;
  std::vector<std::size_t> open;
  for (std::size_t i = 0; i < xml.size();) {
    if (xml[i] != '<') {
      const std::size_t end = xml.find('<', i);
      const std::string text = xml.substr(i, end - i);
      REQUIRE(text.find('>') == std::string::npos);
      for (std::size_t k = text.find('&'); k != std::string::npos; k = text.find('&', k + 1)) {
        REQUIRE(text.find(';', k) < k + 7);
      }
      if (!open.empty()) all[open.back()].text += text;
      i = end == std::string::npos ? xml.size() : end;
      continue;
    }
    const std::size_t end = xml.find('>', i);
    REQUIRE(end != std::string::npos);
    std::string tag = xml.substr(i + 1, end - i - 1);
    i = end + 1;
    if (tag[0] == '/') {
      REQUIRE(!open.empty());
      REQUIRE(all[open.back()].name == tag.substr(1));
      open.pop_back();
      continue;
    }
    const bool closed = tag.back() == '/';
    if (closed) tag.pop_back();
    element e;
    std::size_t at = tag.find(' ');
    e.name = tag.substr(0, at);
    while (at != std::string::npos && at + 1 < tag.size()) {
      const std::size_t equals = tag.find("=\"", at), quote = tag.find('"', equals + 2);
      REQUIRE(equals != std::string::npos);
      REQUIRE(quote != std::string::npos);
      e.attributes[tag.substr(at + 1, equals - at - 1)] = tag.substr(equals + 2, quote - equals - 2);
      at = tag.find(' ', quote);
    }
    e.parent = open.empty() ? 0 : open.back();
    all.push_back(e);
    if (!closed) open.push_back(all.size() - 1);
  }
  REQUIRE(open.empty());
  return all;
}

}  // namespace

TEST_CASE("a drawing is well-formed, has a box for each computation at its time, and its number in it") {
  for (const auto name : pipeline::schedule_names) {
    const pipeline::schedule s = pipeline::named_schedule(name, 8, 20);
    const pipeline::timeline t = simulate(s);
    const auto all = parse(timeline_svg(s, t));

    std::map<std::size_t, std::string> title;  // of a group
    for (const element& e : all) {
      if (e.name == "title") title[e.parent] = e.text;
    }
    std::map<std::string, element> box;             // by "F3, rank 0, 0 to 1"; of a pair, its outline
    std::map<std::string, std::string> fill, text;  // in order
    for (const element& e : all) {
      if (title.count(e.parent) == 0) continue;
      const std::string& of = title[e.parent];
      if (e.name == "rect") {
        box[of] = e;
        fill[of] += e.attributes.at("fill") + " ";
      }
      if (e.name == "text") text[of] += e.text + " ";
    }
    const auto colours = [](const pipeline::action& a) -> std::string {
      const auto forward = [](int chunk) { return chunk == 0 ? "#f5b041 " : "#b9650b "; };
      const auto backward = [](int chunk) { return chunk == 0 ? "#82c96b " : "#2f7d32 "; };
      switch (a.kind) {
        case pipeline::action_kind::forward:
          return forward(a.chunk);
        case pipeline::action_kind::backward:
          return backward(a.chunk);
        case pipeline::action_kind::backward_input:
          return a.chunk == 0 ? "#b5e2a3 " : "#5a9e4b ";
        case pipeline::action_kind::backward_weights:
          return a.chunk == 0 ? "#85c1f5 " : "#2a6cb0 ";
        default:
          return std::string(forward(a.chunk)) + backward(a.backward_chunk) + "none ";
      }
    };
    std::size_t computations = 0;
    for (std::size_t rank = 0; rank < s.actions.size(); ++rank) {
      for (std::size_t i = 0; i < s.actions[rank].size(); ++i) {
        const pipeline::action& a = s.actions[rank][i];
        if (is_communication(a.kind)) continue;
        ++computations;
        std::string word = to_string(a);
        for (std::size_t at; (at = word.find('\'')) != std::string::npos;) word.replace(at, 1, "&#39;");
        if (const std::size_t at = word.find("&B"); at != std::string::npos) word.replace(at, 1, "&amp;");
        const auto when = t.intervals[rank][i];
        const std::string key = word + ", rank " + std::to_string(rank) + ", " + std::to_string(when.begin) + " to " +
                                std::to_string(when.end);
        REQUIRE_MESSAGE(box.count(key) == 1, key);
        CHECK(box[key].number("width") == doctest::Approx(22.0 * double(when.end - when.begin)));
        CHECK(box[key].number("x") == doctest::Approx(64 + 22.0 * double(when.begin)));
        CHECK(fill[key] == colours(a));
        CHECK(text[key] == std::to_string(a.micro_batch) + " " +
                               (a.backward_micro_batch < 0 ? "" : std::to_string(a.backward_micro_batch) + " "));
        CHECK(box[key].number("y") == doctest::Approx(34 + 24.0 * double(rank)));
      }
    }
    CHECK(box.size() == computations);
  }
}

TEST_CASE("a drawing shows idle time, its legend names only what is there, and messages that hold up are bars") {
  const auto count = [](const std::string& text, const std::string& part) {
    int n = 0;
    for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
    return n;
  };
  const pipeline::schedule one = pipeline::one_f_one_b(4, 8), dual = pipeline::dualpipe(4, 8);
  const std::string simple = timeline_svg(one, simulate(one)), both = timeline_svg(dual, simulate(dual));
  CHECK(count(simple, "url(#idle)") == 5);  // four rows and the legend
  CHECK(count(simple, ">9 / 4<") == 1);     // rank 0 idles (P - 1)(F + B) = 9 and keeps 4
  CHECK(count(simple, ">9 / 1<") == 1);
  CHECK(count(simple, "Overlapped") == 0);
  CHECK(count(simple, "Backward for weights") == 0);
  CHECK(count(simple, "second stage") == 0);
  CHECK(count(both, "Overlapped forward &amp; backward") == 1);
  CHECK(count(both, "second stage") == 1);
  CHECK(count(both, "Communication") == 0);
  const std::string held = timeline_svg(dual, simulate(dual, {.latency = 2}, pipeline::messages::rendezvous));
  CHECK(count(held, "Communication") == 1);
  CHECK(count(held, "fill=\"#777\"") > 20);
}

TEST_CASE("long steps are drawn narrower, names are escaped, and other timelines are refused") {
  pipeline::schedule s = pipeline::zb1p(4, 40);
  s.name = "<mine> & \"yours\"";
  const pipeline::timeline t = simulate(s, {.stages = {{1000, 2000, 1000, 1000, 3000}}});
  const auto all = parse(timeline_svg(s, t, {.max_width = 500}));
  CHECK(all[0].number("width") < 1000);
  bool named = false;
  for (const element& e : all) named = named || e.text.find("&lt;mine&gt; &amp; &quot;yours&quot;: 4 ranks") == 0;
  CHECK(named);
  const pipeline::schedule other = pipeline::one_f_one_b(4, 40);
  CHECK_THROWS_WITH_AS(timeline_svg(other, t), doctest::Contains("is not one of schedule '1F1B'"),
                       ts::invalid_argument);
  CHECK_THROWS_AS(timeline_svg(s, t, {.box_width = 0}), ts::invalid_argument);
  CHECK_THROWS_AS(timeline_svg(s, t, {.forward_share = 2}), ts::invalid_argument);
}
