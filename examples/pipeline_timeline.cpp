// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Prints and draws pipeline schedules: what each rank does in which order, when, and how long it idles.
//   pipeline_timeline --schedule dualpipe --stages 8 --micro-batches 20
//   pipeline_timeline --compare --stages 8 --micro-batches 20 --overlapped 2
//   pipeline_timeline --schedule gpipe --stages 4 --micro-batches 8 --latency 1 --messages rendezvous

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <tessera/pipeline/communication.hpp>
#include <tessera/pipeline/schedules.hpp>
#include <tessera/pipeline/timeline_svg.hpp>
#include <tessera/pipeline/validate.hpp>

namespace ts = tessera;
namespace pipeline = tessera::pipeline;

namespace {

// A schedule of one's own: say what every rank computes, in which order. with_communication adds the messages, validate
// proves that nothing is missing or waits forever. This one is GPipe: all forwards, then all backwards.
pipeline::schedule gpipe(int num_ranks, int num_micro_batches) {
  TESSERA_EXPECTS(num_ranks >= 1 && num_micro_batches >= 1,
                  "GPipe: " << num_ranks << " ranks, " << num_micro_batches << " micro-batches; right is at least 1");
  pipeline::schedule s{.name = "GPipe",
                       .num_ranks = num_ranks,
                       .num_stages = num_ranks,
                       .num_micro_batches = num_micro_batches,
                       .routes = pipeline::straight_routes(num_ranks),
                       .route_of = std::vector<int>(static_cast<std::size_t>(num_micro_batches), 0),
                       .max_live_activations = num_micro_batches};
  std::vector<pipeline::action> list;
  for (int m = 0; m < num_micro_batches; ++m) list.push_back({pipeline::action_kind::forward, 0, m});
  for (int m = 0; m < num_micro_batches; ++m) list.push_back({pipeline::action_kind::backward, 0, m});
  s.actions.assign(static_cast<std::size_t>(num_ranks), list);
  return pipeline::with_communication(std::move(s));
}

struct settings {
  std::string schedule = "dualpipe";
  int stages = 8;
  int micro_batches = 20;
  std::int64_t forward = 1, backward_input = 1, backward_weights = 1, overlapped = -1, latency = 0;
  pipeline::messages messages = pipeline::messages::buffered;
  std::string output = "timeline.svg";
  bool compare = false;
  bool computation = false;
};

pipeline::schedule make(const settings& s, const std::string& name) {
  pipeline::schedule made =
      name == "gpipe" ? gpipe(s.stages, s.micro_batches) : pipeline::named_schedule(name, s.stages, s.micro_batches);
  pipeline::validate(made);
  return made;
}

pipeline::costs costs_of(const settings& s) {
  const std::int64_t backward = s.backward_input + s.backward_weights;
  const pipeline::stage_times times{.forward = s.forward,
                                    .backward = backward,
                                    .backward_input = s.backward_input,
                                    .backward_weights = s.backward_weights,
                                    .overlapped = s.overlapped < 0 ? s.forward + backward : s.overlapped};
  return {.stages = {times}, .latency = s.latency};
}

void print_row(const pipeline::schedule& made, const pipeline::timeline& t) {
  int live = 0;
  for (const int activations : t.live_activations) live = std::max(live, activations);
  std::printf("%-10s %6d %12lld %12lld %8.1f %% %8d %8d\n", made.name.c_str(), made.num_ranks,
              static_cast<long long>(t.makespan), static_cast<long long>(t.max_idle()),
              t.makespan == 0 ? 0.0 : 100.0 * static_cast<double>(t.max_idle()) / static_cast<double>(t.makespan), live,
              made.num_chunks);
}

void print_head() {
  std::printf("%-10s %6s %12s %12s %10s %8s %8s\n", "schedule", "ranks", "step time", "longest idle", "of step", "live",
              "chunks");
}

void compare(const settings& s) {
  print_head();
  std::vector<std::string> names = {"gpipe"};
  names.insert(names.end(), std::begin(pipeline::schedule_names), std::end(pipeline::schedule_names));
  for (const std::string& name : names) {
    try {
      const pipeline::schedule made = make(s, name);
      print_row(made, pipeline::simulate(made, costs_of(s), s.messages));
    } catch (const ts::invalid_argument& e) {
      std::printf("%-10s %s\n", name.c_str(), e.what());
    }
  }
}

void show(const settings& s) {
  const pipeline::schedule made = make(s, s.schedule);
  const pipeline::costs costs = costs_of(s);
  const pipeline::timeline t = pipeline::simulate(made, costs, s.messages);
  std::cout << to_string(made, s.computation ? pipeline::detail_level::computation : pipeline::detail_level::everything)
            << std::endl;
  print_head();
  print_row(made, t);
  if (s.output.empty()) return;
  const double both = static_cast<double>(costs.of(0).forward + costs.of(0).backward);
  std::ofstream file(s.output);
  file << pipeline::timeline_svg(made, t, {.forward_share = static_cast<double>(s.forward) / (both > 0 ? both : 1)});
  file.close();
  TESSERA_EXPECTS_AS(ts::error, file.good(), "the drawing cannot be written to '" << s.output << "'");
  std::printf("\nDrawn to %s\n", s.output.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  settings s;
  CLI::App app{"Prints and draws what every rank of a pipeline does.\n", "pipeline_timeline"};
  app.footer(
      "\nIn the lists: F forward, B backward, I and W its input and weight parts, F&B an overlapped pair, a number for "
      "the\n"
      "micro-batch, a stroke for the rank's second stage; s and r send and receive, in [] what is under way at once.\n"
      "Times are integers in any unit. Exit codes: 0 done, 1 an error that is explained.");
  app.get_formatter()->column_width(34);
  app.option_defaults()->always_capture_default();
  app.add_option("--schedule,-s", s.schedule, "1f1b, zb1p, dualpipe, dualpipev, gpipe")->type_name("NAME");
  app.add_option("--stages,-P", s.stages, "Stages (dualpipev: two on every rank)")->type_name("P");
  app.add_option("--micro-batches,-M", s.micro_batches, "Micro-batches of a step")->type_name("M");
  app.add_option("--forward,-F", s.forward, "Time of a forward")->type_name("T");
  app.add_option("--backward-input,-I", s.backward_input, "Time of the input part of a backward")->type_name("T");
  app.add_option("--backward-weights,-W", s.backward_weights, "Time of its weight part")->type_name("T");
  app.add_option("--overlapped", s.overlapped, "Time of an overlapped pair (default: all three)")
      ->type_name("T")
      ->default_str("");
  app.add_option("--latency", s.latency, "Time of a message between ranks")->type_name("T");
  const std::map<std::string, pipeline::messages> ways{{"buffered", pipeline::messages::buffered},
                                                       {"rendezvous", pipeline::messages::rendezvous}};
  app.add_option("--messages", s.messages, "buffered (as papers count) or rendezvous (batches hold up their rank)")
      ->type_name("KIND")
      ->default_str("buffered")
      ->transform(CLI::CheckedTransformer(ways, CLI::ignore_case).description(""));
  app.add_option("--output,-o", s.output, "SVG file to draw to, '' for none")->type_name("FILE");
  app.add_flag("--computation", s.computation, "Leave sends and receives out of the lists");
  app.add_flag("--compare", s.compare, "Only a table of all schedules of this size");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
  }
  try {
    s.compare ? compare(s) : show(s);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "pipeline_timeline: error: %s\n", e.what());
    return EXIT_FAILURE;
  }
}
