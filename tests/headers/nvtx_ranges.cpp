// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The named ranges that profilers are shown, recorded by a tool linked into the program.

#define TESSERA_ENABLE_NVTX

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include <tessera/tessera.hpp>
#if defined(TESSERA_HAS_CHECKPOINT)
#include <tessera/checkpoint/checkpoint.hpp>

#include "../checkpoint/checkpoint_case.hpp"
#endif

#include "../pipeline/pipeline_fixture.hpp"
#include "../support/layer_fixture.hpp"

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;
namespace pl = tessera::pipeline;
using self = ts::comm::self<ts::space::host>;

// ---------------------------------------------------------------------------------------------------------------------
// The tool

std::vector<std::string>& begun() {
  static std::vector<std::string> names;
  return names;
}
int open_ranges = 0;
bool other_domain = false;
int tessera_domain;  // its address stands for the domain

nvtxDomainHandle_t NVTX_API create_domain(const char* name) {
  return std::string(name) == "tessera" ? reinterpret_cast<nvtxDomainHandle_t>(&tessera_domain) : nullptr;
}
int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
  other_domain |= domain != reinterpret_cast<nvtxDomainHandle_t>(&tessera_domain);
  begun().emplace_back(attributes->message.ascii);
  return open_ranges++;
}
int NVTX_API pop(nvtxDomainHandle_t) { return --open_ranges; }

int NVTX_API attach(NvtxGetExportTableFunc_t tables) {
  const auto* const callbacks = static_cast<const NvtxExportTableCallbacks*>(tables(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (callbacks == nullptr || callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = reinterpret_cast<NvtxFunctionPointer>(create_domain);
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = reinterpret_cast<NvtxFunctionPointer>(push);
  *table[NVTX_CBID_CORE2_DomainRangePop] = reinterpret_cast<NvtxFunctionPointer>(pop);
  return 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// What has ranges

void use_layer() {
  using namespace tessera_test;
  using layer =
      ts::moe_layer<ts::router<>, ts::experts<ts::activation::swiglu, ts::precision::fp32>, ts::layout::block, self>;
  const layer_problem p = make_problem({.num_experts = 4, .top_k = 2, .hidden = 6, .intermediate = 4}, 8, true, 3);
  self comm;
  layer_rank<layer> rank(p, ts::layout::block(4, 1), comm, 0, 8, 8, {}, {});
  rank.forward(ts::pass::train);
  rank.backward_input();
  rank.backward_weights();
  rank.layer->end_step({}, comm);
}

void use_shards() {
  using model_type = sh::fully_sharded<ts::precision::fp32, float, ts::reduction::native, self>;
  self comm;
  const std::vector<sh::group<self>> groups{
      {.name = "all", .parameters = {{.name = "a", .whole = ts::box::whole({3, 2})}}, .ranks = &comm}};
  const std::vector<sh::group_shape> shapes{sh::shape_of(groups[0])};
  const auto sizes = sh::memory_of<ts::precision::fp32, float, ts::reduction::native>(shapes, {});
  ts::host_buffer state(sizes.state()), step(sizes.step());
  std::fill_n(state.data(), state.size(), std::byte{0});
  model_type model(groups, {}, ts::state_memory(state), sh::step_memory(step));
  model.forward([](int) {});
  model.backward([&](int g) { std::ranges::fill(model.full_gradient(g, 0), 1.0F); });
  model.step({}, 1, 0.1);
}

void use_pipeline() {
  self comm;
  const pl::schedule schedule = pl::one_f_one_b(1, 2);
  pipeline_test::pipeline_rank<self> rank(schedule, comm, 3);
  const std::vector<std::int64_t> rows{3, 2};
  rank.run(rows);
}

void use_checkpoint() {
#if defined(TESSERA_HAS_CHECKPOINT)
  namespace ck = tessera::checkpoint;
  const tessera_test::temporary_folder folder;
  self comm;
  float values[4] = {1, 2, 3, 4};
  const std::vector<ck::target_piece> pieces{ck::piece_of("a", values, ts::box::whole({4}))};
  const std::vector<ck::source_piece> sources(pieces.begin(), pieces.end());
  const ck::save_plan plan = ck::make_plan(comm, sources);
  ck::saver<self> saver(comm, {.directory = folder / "saved", .sync = false});
  saver.save(plan, sources, {.step = 1});
  saver.save_async(plan, sources, {.step = 2});
  saver.wait();
  ck::resume(comm, folder / "saved", pieces);
#endif
}

// Runs `body`, which must begin these ranges, and end all of them.
bool begins(const std::vector<std::string>& names, void (*body)()) {
  begun().clear();
  body();
  bool right = open_ranges == 0 && !other_domain;
  for (const std::string& name : names) {
    if (std::find(begun().begin(), begun().end(), "tessera::" + name) != begun().end()) continue;
    std::printf("no range tessera::%s\n", name.c_str());
    right = false;
  }
  return right;
}

}  // namespace

int main() {
  InitializeInjectionNvtx2_fnptr = attach;  // before the first range
  bool right =
      begins({"moe_layer::forward", "moe_layer::backward_input", "moe_layer::backward_weights", "moe_layer::end_step"},
             use_layer);
  right &= begins({"shard::fully_sharded::begin_gather", "shard::fully_sharded::reduce", "shard::fully_sharded::step"},
                  use_shards);
  right &= begins({"pipeline::executor::run"}, use_pipeline);
#if defined(TESSERA_HAS_CHECKPOINT)
  right &= begins(
      {"checkpoint::saver::save", "checkpoint::saver::save_async", "checkpoint::saver::wait", "checkpoint::load"},
      use_checkpoint);
#endif
  std::printf("%s\n", right ? "all ranges are there, in the domain tessera"
                            : "ranges are missing, left open or in another domain");
  return right ? 0 : 1;
}
