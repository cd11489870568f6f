// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The C++ half of the parity test: reads a case that parity.py wrote, runs it through moe_layer with the types of the
// model's preset, and compares output and gradients.
//
//     tessera_parity_driver CASE [--ranks N] [--tolerance R]
//
// Exit status: 0 all agree, 1 a difference (tensors and worst elements are printed), 2 the case could not be run.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <tessera/comm/threads.hpp>
#include <tessera/dispatch/replicas.hpp>
#include <tessera/layout/layout.hpp>
#include <tessera/moe/moe_layer.hpp>
#include <tessera/moe/presets.hpp>

namespace ts = tessera;

namespace {

// --- The case
// ---------------------------------------------------------------------------------------------------------

struct tensor {
  std::vector<std::int64_t> extents;
  std::vector<double> values;

  template <class T>
  std::vector<T> as() const {
    std::vector<T> result(values.size());
    std::transform(values.begin(), values.end(), result.begin(), [](double v) { return static_cast<T>(v); });
    return result;
  }
};

class parity_case {
 public:
  explicit parity_case(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    TESSERA_EXPECTS(file, "cannot read " << path);
    std::vector<std::pair<std::string, std::string>> order;  // name, dtype
    for (std::string line; std::getline(file, line) && line != "end";) {
      std::istringstream words(line);
      std::string kind, name;
      words >> kind >> name;
      if (kind == "option") {
        words >> options_[name];
      } else {
        std::string dtype;
        int rank = 0;
        words >> dtype >> rank;
        std::vector<std::int64_t> extents(static_cast<std::size_t>(rank));
        for (auto& extent : extents) words >> extent;
        TESSERA_EXPECTS(kind == "tensor" && words, "unexpected line in " << path << ": " << line);
        order.push_back({name, dtype});
        tensors_[name].extents = extents;
      }
    }
    for (const auto& [name, dtype] : order) {
      if (dtype == "F64") read<double>(file, tensors_[name]);
      if (dtype == "F32") read<float>(file, tensors_[name]);
      if (dtype == "I32") read<std::int32_t>(file, tensors_[name]);
      TESSERA_EXPECTS(file, path << " ends inside tensor " << name);
    }
  }

  bool has(const std::string& name) const { return tensors_.count(name) > 0; }
  const tensor& get(const std::string& name) const {
    TESSERA_EXPECTS(has(name), "the case has no tensor " << name);
    return tensors_.at(name);
  }
  std::string word(const std::string& name) const {
    TESSERA_EXPECTS(options_.count(name) > 0, "the case has no option " << name);
    return options_.at(name);
  }
  double number(const std::string& name, double otherwise) const {
    return options_.count(name) > 0 ? std::stod(options_.at(name)) : otherwise;
  }
  int integer(const std::string& name) const { return std::stoi(word(name)); }

 private:
  template <class T>
  static void read(std::istream& file, tensor& into) {
    std::int64_t count = 1;
    for (const std::int64_t extent : into.extents) count *= extent;
    std::vector<T> raw(static_cast<std::size_t>(count));
    file.read(reinterpret_cast<char*>(raw.data()), static_cast<std::streamsize>(raw.size() * sizeof(T)));
    into.values.assign(raw.begin(), raw.end());
  }

  std::map<std::string, std::string> options_;
  std::map<std::string, tensor> tensors_;
};

// --- Options of the preset's router, with the sizes and coefficients of the case
// --------------------------------------

template <class Router>
struct balances_of;

template <class Score, class Select, class Weigh, class... Balances>
struct balances_of<ts::router<Score, Select, Weigh, Balances...>> {
  static void set_coefficients(std::tuple<typename Balances::options...>& options, const parity_case& values) {
    std::apply([&](auto&... each) { (set_one<Balances>(each, values), ...); }, options);
  }

 private:
  template <class Balance, class Options>
  static void set_one(Options& options, const parity_case& values) {
    if constexpr (ts::balance_is_loss<Balance>) {
      options.coefficient = static_cast<float>(values.number(std::string(Balance::name), 0));
    }
  }
};

template <class Preset>
typename Preset::router::options router_options(const parity_case& values) {
  auto options = Preset::options();
  options.num_experts = values.integer("num_experts");
  options.top_k = values.integer("top_k");
  if constexpr (requires { options.select.groups; }) {
    options.select.groups = values.integer("groups");
    options.select.kept_groups = values.integer("kept_groups");
  }
  TESSERA_EXPECTS(options.weigh.scale == values.number("scale", 1),
                  "the preset scales by " << options.weigh.scale << ", the model by " << values.number("scale", 1));
  balances_of<typename Preset::router>::set_coefficients(options.balance, values);
  return options;
}

// --- Experts over ranks
// -----------------------------------------------------------------------------------------------

// Even rank counts deal experts out and replicate every fifth; odd ones hold them in blocks.
std::vector<std::vector<std::int32_t>> experts_of_ranks(int num_experts, int num_ranks) {
  std::vector<std::vector<std::int32_t>> lists(static_cast<std::size_t>(num_ranks));
  for (int e = 0; e < num_experts; ++e) {
    const auto block = static_cast<std::size_t>(ts::layout::block(num_experts, num_ranks).owner(e).rank);
    const auto dealt = static_cast<std::size_t>(e % num_ranks);
    lists[num_ranks % 2 == 0 ? dealt : block].push_back(e);
    if (num_ranks % 2 == 0 && e % 5 == 0) lists[(dealt + 1) % lists.size()].push_back(e);
  }
  return lists;
}

// The rank's slots of a tensor over all experts.
template <class S>
std::vector<S> local_part(const tensor& whole, const ts::layout::table& placement, int rank) {
  const std::vector<S> values = whole.as<S>();
  const auto stride = static_cast<std::int64_t>(values.size()) / whole.extents[0];
  std::vector<S> local(static_cast<std::size_t>(placement.num_slots(rank) * stride));
  for (const ts::expert_range& range : ts::expert_ranges(placement, rank)) {
    std::copy_n(values.begin() + range.first_expert * stride, range.count * stride,
                local.begin() + range.first_slot * stride);
  }
  return local;
}

// Writes what a rank has of it back into the tensor over all experts: primary copies.
template <class G>
void collect(const std::vector<G>& local, std::int64_t stride, const ts::layout::table& placement, int rank,
             std::vector<double>& whole) {
  for (const ts::expert_range& range : ts::expert_ranges(placement, rank, ts::copies::primary)) {
    std::copy_n(local.begin() + range.first_slot * stride, range.count * stride,
                whole.begin() + range.first_expert * stride);
  }
}

// --- One run
// ----------------------------------------------------------------------------------------------------------

// What the ranks computed, put together. Ranks write disjoint parts of `whole`, and each its own entry of `partial`,
// the contributions to replicated parameters.
struct results {
  std::map<std::string, std::vector<double>> whole;
  std::vector<std::map<std::string, std::vector<double>>> partial;
};

template <class T>
std::vector<double> widen(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}

template <class Preset, class Precision, class Comm>
void run_rank(const parity_case& values, const ts::layout::table& placement, Comm& comm, results& out) {
  using experts = typename Preset::template experts<Precision>;
  using layer = ts::moe_layer<typename Preset::router, experts, ts::layout::table, Comm>;
  using S = typename Precision::storage;
  using A = typename Precision::accumulate;
  constexpr S unset = std::numeric_limits<S>::quiet_NaN();  // overwriting must overwrite everything

  ts::shape dims = Preset::dimensions(values.get("x").extents[0]);
  dims.num_experts = values.integer("num_experts");
  dims.top_k = values.integer("top_k");
  dims.hidden = values.integer("hidden");
  dims.intermediate = values.integer("intermediate");
  TESSERA_EXPECTS(dims.num_shared_experts == values.integer("num_shared_experts") &&
                      dims.gate_bias == values.has("gate_bias") && dims.expert_bias == values.has("up_bias"),
                  "the preset and the model differ in shared experts or biases");

  // Ranks take whole sequences.
  const auto offsets = values.get("sequence_offsets").as<std::int32_t>();
  const auto num_sequences = static_cast<int>(offsets.size()) - 1;
  const int rank = comm.rank(), ranks = comm.size();
  const auto first = static_cast<std::size_t>(num_sequences * rank / ranks);
  const auto last = static_cast<std::size_t>(num_sequences * (rank + 1) / ranks);
  std::vector<std::int32_t> own_offsets;
  for (std::size_t i = first; i <= last; ++i) own_offsets.push_back(offsets[i] - offsets[first]);
  const std::int64_t begin = offsets[first], tokens = own_offsets.back(), d = dims.hidden;

  typename layer::options options;
  options.activation = Preset::activation_options();
  const ts::layer_sizes sizes = layer::sizes(dims, placement, rank, options);
  ts::host_buffer state(sizes.state_bytes), saved(sizes.saved_bytes), deferred(sizes.deferred_bytes),
      workspace(sizes.workspace_bytes);
  layer moe(dims, router_options<Preset>(values), placement, comm, state, options);
  const ts::host_stream stream;
  moe.reset_state(stream);
  if constexpr (Preset::router::has_bias) {
    const auto bias = values.get("bias").as<float>();
    std::copy(bias.begin(), bias.end(), moe.state().bias);
  }

  // Parameters.
  std::map<std::string, std::vector<S>> local;
  for (const char* name : {"up", "down", "up_bias", "down_bias"}) {
    if (values.has(name)) local[name] = local_part<S>(values.get(name), placement, rank);
  }
  for (const char* name : {"shared_up", "shared_down"}) {
    if (values.has(name)) local[name] = values.get(name).as<S>();
  }
  const auto pointer = [](auto& map, const char* name) {
    const auto found = map.find(name);
    return found == map.end() ? nullptr : found->second.data();
  };
  const auto gate = values.get("gate").as<A>();
  const auto gate_bias = values.has("gate_bias") ? values.get("gate_bias").as<A>() : std::vector<A>();
  typename layer::weights weights;
  weights.gate = {gate.data(), dims.num_experts, d};
  weights.gate_bias = gate_bias.empty() ? nullptr : gate_bias.data();
  weights.experts = {pointer(local, "up"), pointer(local, "down"), pointer(local, "up_bias"),
                     pointer(local, "down_bias")};
  weights.shared = {pointer(local, "shared_up"), pointer(local, "shared_down"), nullptr, nullptr};

  // Gradients: of the experts in the gradient type, of replicated parameters in the accumulation type.
  static_assert(std::is_same_v<typename Precision::gradient, S> && std::is_same_v<A, S>);
  std::map<std::string, std::vector<S>> gradient;
  for (const auto& [name, value] : local) gradient[name].assign(value.size(), unset);
  gradient["gate"].assign(gate.size(), unset);
  if (!gate_bias.empty()) gradient["gate_bias"].assign(gate_bias.size(), unset);
  typename layer::gradients gradients;
  gradients.gate = pointer(gradient, "gate");
  gradients.gate_bias = pointer(gradient, "gate_bias");
  gradients.experts = {pointer(gradient, "up"), pointer(gradient, "down"), pointer(gradient, "up_bias"),
                       pointer(gradient, "down_bias")};
  gradients.shared = {pointer(gradient, "shared_up"), pointer(gradient, "shared_down"), nullptr, nullptr};

  // Forward and backward.
  const auto x = values.get("x").as<S>(), dy = values.get("dy").as<S>();
  std::vector<S> y(static_cast<std::size_t>(tokens * d), unset), dx = y;
  typename layer::inputs inputs;
  inputs.x = {x.data() + begin * d, tokens, d};
  inputs.sequence_offsets = own_offsets;
  const ts::matrix_view<const S> own_dy(dy.data() + begin * d, tokens, d);
  moe.forward(stream, ts::pass::train, inputs, weights, {y.data(), tokens, d}, saved, workspace);
  moe.backward_input(stream, inputs, own_dy, weights, saved, {dx.data(), tokens, d}, deferred, workspace);
  moe.backward_weights(stream, inputs, own_dy, saved, deferred, gradients, ts::write::overwrite);

  // Put together.
  std::copy(y.begin(), y.end(), out.whole["y"].begin() + begin * d);
  std::copy(dx.begin(), dx.end(), out.whole["dx"].begin() + begin * d);
  auto& partial = out.partial[static_cast<std::size_t>(rank)];
  partial["losses"] = {0.0};
  for (int i = 0; i < layer::num_losses; ++i) partial["losses"][0] += static_cast<double>(moe.state().losses[i]);
  for (auto& [name, value] : gradient) {
    const bool of_experts = name == "up" || name == "down" || name == "up_bias" || name == "down_bias";
    if (!of_experts) {
      partial[name + "_grad"] = widen(value);
      continue;
    }
    const tensor& whole = values.get(name);
    const auto stride = static_cast<std::int64_t>(whole.values.size()) / whole.extents[0];
    std::vector<S> scratch(static_cast<std::size_t>(ts::replica_workspace_elements(placement, stride)));
    ts::sum_replica_gradients<A>(stream, comm, placement, value.data(), stride, scratch.data());
    collect(value, stride, placement, rank, out.whole[name + "_grad"]);
  }
}

// --- Comparison
// -------------------------------------------------------------------------------------------------------

// Elements must agree within `tolerance * (|expected| + root mean square of the tensor)`.
bool agrees(const std::string& name, const std::vector<double>& actual, const std::vector<double>& expected,
            double tolerance, double& worst) {
  double squares = 0;
  for (const double v : expected) squares += v * v;
  const double size = std::sqrt(squares / static_cast<double>(std::max<std::size_t>(expected.size(), 1)));
  double error = 0;
  std::size_t at = 0;
  if (actual.size() != expected.size()) {
    std::cout << name << " has " << actual.size() << " elements, expected " << expected.size() << "\n";
    return false;
  }
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(actual[i] - expected[i]);
    const double scaled = difference == 0 ? 0 : difference / (std::abs(expected[i]) + size);
    if (!(scaled <= error)) {  // NaN counts as worse
      error = scaled;
      at = i;
      if (std::isnan(scaled)) break;
    }
  }
  if (!(error <= worst)) worst = error;
  if (error <= tolerance) return true;
  std::cout << name << " differs: element " << at << " is " << actual[at] << ", expected " << expected[at]
            << " (relative error " << error << ", tolerance " << tolerance << ")\n";
  return false;
}

template <class Preset, class Precision>
bool compare(const parity_case& values, int ranks, double tolerance) {
  results out;
  out.partial.resize(static_cast<std::size_t>(ranks));
  std::vector<std::string> names{"y", "dx", "gate_grad", "losses"};
  for (const char* name : {"gate_bias", "up", "down", "up_bias", "down_bias", "shared_up", "shared_down"}) {
    if (values.has(name)) names.push_back(std::string(name) + "_grad");
  }
  for (const auto& name : names) out.whole[name].assign(values.get(name).values.size(), 0.0);

  const int num_experts = values.integer("num_experts");
  const ts::layout::table_storage storage(num_experts, experts_of_ranks(num_experts, ranks));
  ts::comm::threads::run(
      ranks, [&](ts::comm::threads& comm) { run_rank<Preset, Precision>(values, storage.view(), comm, out); });
  for (const auto& partial : out.partial) {
    for (const auto& [name, value] : partial) {
      auto& sum = out.whole[name];
      std::transform(value.begin(), value.end(), sum.begin(), sum.begin(), std::plus<>());
    }
  }

  bool same = true;
  double worst = 0;
  for (const auto& name : names) {
    same = agrees(name, out.whole[name], values.get(name).values, tolerance, worst) && same;
  }
  std::cout << names.size() << " tensors, worst relative error " << worst << "\n";
  return same;
}

template <class Preset>
bool compare(const parity_case& values, int ranks, double tolerance) {
  return values.word("precision") == "f64" ? compare<Preset, ts::precision::fp64>(values, ranks, tolerance)
                                           : compare<Preset, ts::precision::fp32>(values, ranks, tolerance);
}

bool compare(const parity_case& values, int ranks, double tolerance) {
  namespace presets = ts::presets;
  const std::string model = values.word("model");
  if (model == "mixtral") return compare<presets::mixtral_8x7b>(values, ranks, tolerance);
  if (model == "qwen3_moe") return compare<presets::qwen3_30b_a3b>(values, ranks, tolerance);
  if (model == "olmoe") return compare<presets::olmoe>(values, ranks, tolerance);
  if (model == "deepseek_v2_lite") return compare<presets::deepseek_v2_lite>(values, ranks, tolerance);
  if (model == "deepseek_v3") return compare<presets::deepseek_v3>(values, ranks, tolerance);
  if (model == "glm4_moe") return compare<presets::glm_4_5>(values, ranks, tolerance);
  if (model == "gpt_oss") return compare<presets::gpt_oss_120b>(values, ranks, tolerance);
  if (model == "llama4") return compare<presets::llama4_maverick>(values, ranks, tolerance);
  throw ts::invalid_argument("there is no preset for model " + model);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    TESSERA_EXPECTS(argc >= 2 && argc % 2 == 0, "usage: tessera_parity_driver CASE [--ranks N] [--tolerance R]");
    int ranks = 1;
    double tolerance = 1e-9;
    for (int i = 2; i < argc; i += 2) {
      const std::string_view name = argv[i];
      TESSERA_EXPECTS(name == "--ranks" || name == "--tolerance", "unknown option " << name);
      if (name == "--ranks") ranks = std::stoi(argv[i + 1]);
      if (name == "--tolerance") tolerance = std::stod(argv[i + 1]);
    }
    return compare(parity_case(argv[1]), ranks, tolerance) ? EXIT_SUCCESS : EXIT_FAILURE;
  } catch (const std::exception& error) {
    std::cout << "error: " << error.what() << "\n";
    return 2;
  }
}
