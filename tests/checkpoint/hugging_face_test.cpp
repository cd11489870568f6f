// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/comm/threads.hpp>
#include <tessera/experts/weight_layout.hpp>
#include <tessera/layout/layout.hpp>

#include "checkpoint_case.hpp"

using namespace tessera_test;

namespace {

constexpr int experts = 6;
constexpr int hidden = 4;
constexpr int width = 3;  // inside one expert

// A tensor of a model, bf16 in 16 bits each.
struct stored {
  std::vector<std::int64_t> shape;
  std::vector<std::uint16_t> values;
};
using model = std::map<std::string, stored>;

stored make(const std::string& name, std::vector<std::int64_t> shape) {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  stored tensor{std::move(shape), {}};
  for (std::int64_t i = 0; i < count; ++i) tensor.values.push_back(static_cast<std::uint16_t>(bits_of(name, i, 1)));
  return tensor;
}

// Writes some tensors of a model to a file as other programs do: its own order, no alignment.
void write_shard(const std::string& path, const model& tensors) {
  std::string header = "{";
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header += (header.size() > 1 ? ",\"" : "\"") + name + "\": {\"dtype\":\"BF16\", \"shape\":[";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      header += (i > 0 ? "," : "") + std::to_string(tensor.shape[i]);
    }
    header += "],\"data_offsets\":[" + std::to_string(data.size()) + ",";
    data.append(reinterpret_cast<const char*>(tensor.values.data()), tensor.values.size() * 2);
    header += std::to_string(data.size()) + "]}";
  }
  header += "}";
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 255U);
  write_file(path, length + header + data);
}

// All tensors of a model, in one file or several.
model read_model(const std::string& folder) {
  model result;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string path = entry.path().string();
    if (entry.path().extension() != ".safetensors") continue;
    const ck::safetensors_header header = ck::read_safetensors_header(path);
    const std::string bytes = read_file(path);
    for (const ck::safetensors_entry& e : header.entries) {
      REQUIRE(e.type == ck::element_type::bf16);
      stored tensor{e.shape, std::vector<std::uint16_t>(static_cast<std::size_t>(e.end - e.begin) / 2)};
      std::memcpy(tensor.values.data(), bytes.data() + header.data_begin + e.begin,
                  static_cast<std::size_t>(e.end - e.begin));
      REQUIRE(result.emplace(e.name, tensor).second);
    }
  }
  return result;
}

bool operator==(const stored& a, const stored& b) { return a.shape == b.shape && a.values == b.values; }

std::string expert_name(int expert, const std::string& matrix) {
  return "model.layers.0.mlp.experts." + std::to_string(expert) + "." + matrix + ".weight";
}

const ts::box up_whole = ts::box::whole({experts, 2 * width, hidden});
const ts::box down_whole = ts::box::whole({experts, hidden, width});

// What a rank of a layer holds of the experts, as the layer's weights lie in memory.
struct layer_rank {
  ts::layout::block placement;
  std::vector<ts::bfloat16> up;
  std::vector<ts::bfloat16> down;
  std::vector<ck::target_piece> pieces;

  template <class Comm>
  layer_rank(const Comm& comm, const ts::box& up_extents, const ts::box& down_extents)
      : placement(experts, comm.size()) {
    const int slots = placement.num_slots(comm.rank());
    up.resize(static_cast<std::size_t>(slots * 2 * width * hidden));
    down.resize(static_cast<std::size_t>(slots * width * hidden));
    pieces = ck::expert_pieces("up", up.data(), up_extents, placement, comm.rank());
    for (auto& piece : ck::expert_pieces("down", down.data(), down_extents, placement, comm.rank())) {
      pieces.push_back(std::move(piece));
    }
  }
};

// Imports a model on `import_ranks`, checks the weights with `check(rank's memory, slot, expert)`, saves them, and
// exports the checkpoint on `export_ranks`.
template <class Check>
void round_trip(const std::string& folder, const ck::name_map& names, const ts::box& up, const ts::box& down,
                std::int64_t max_file_bytes, Check&& check) {
  ts::comm::threads::run(3, [&](ts::comm::threads& comm) {
    layer_rank layer(comm, up, down);
    const ck::manifest content = ck::hugging_face_manifest(comm, folder + "/model", names);
    ck::load(comm, folder + "/model", content, layer.pieces);
    for (int slot = 0; slot < layer.placement.num_slots(comm.rank()); ++slot) {
      check(layer, slot, layer.placement.expert_at(comm.rank(), slot));
    }
    ck::saver saver(comm, {.directory = folder + "/run", .sync = false});
    const std::vector<ck::source_piece> sources(layer.pieces.begin(), layer.pieces.end());
    saver.save(ck::make_plan(comm, sources), sources, {.step = 1});
  });
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    ck::export_hugging_face(comm, folder + "/run/step-1", names, folder + "/export",
                            {.max_file_bytes = max_file_bytes});
  });
}

void expect_same(bool same) {
  if (!same) throw std::runtime_error("a weight is not the model's");
}

TEST_CASE("experts with names of their own load into a layer's weights and are exported unchanged, in several files") {
  temporary_folder folder;
  fs::create_directories(folder / "model");
  model tensors;
  model first;
  model second;
  std::string weight_map;
  for (int e = 0; e < experts; ++e) {
    for (const auto& [matrix, shape] : std::map<std::string, std::vector<std::int64_t>>{
             {"gate_proj", {width, hidden}}, {"up_proj", {width, hidden}}, {"down_proj", {hidden, width}}}) {
      const std::string name = expert_name(e, matrix);
      tensors[name] = make(name, shape);
      const bool in_first = (e + static_cast<int>(matrix.size())) % 2 == 0;
      (in_first ? first : second)[name] = tensors[name];
      weight_map += (weight_map.empty() ? "\"" : ",\"") + name + "\":\"" + (in_first ? "a" : "b") + ".safetensors\"";
    }
  }
  second["lm_head.weight"] = make("lm_head.weight", {2, 2});  // of no interest
  weight_map += ",\"lm_head.weight\":\"b.safetensors\"";
  write_shard(folder / "model/a.safetensors", first);
  write_shard(folder / "model/b.safetensors", second);
  write_file(folder / "model/model.safetensors.index.json", "{\"metadata\":{},\"weight_map\":{" + weight_map + "}}");

  ck::name_map names;
  names.per_expert("up", up_whole, 0, width, "model.layers.0.mlp.experts.{}.gate_proj.weight")
      .per_expert("up", up_whole, width, width, "model.layers.0.mlp.experts.{}.up_proj.weight")
      .per_expert("down", down_whole, 0, hidden, "model.layers.0.mlp.experts.{}.down_proj.weight");
  using layout = ts::weight_layout::out_in_concatenated;
  round_trip(folder.str(), names, up_whole, down_whole, 100, [&](layer_rank& layer, int slot, int expert) {
    const auto up = layout::up(layer.up.data(), 2 * width, hidden, 0);
    const auto down = layout::down(layer.down.data(), hidden, width, 0);
    for (int i = 0; i < width; ++i) {
      for (int j = 0; j < hidden; ++j) {
        const auto at = [&](std::int64_t column) {
          return up.data[slot * up.group_stride + column * up.row_stride + j * up.col_stride].bits;
        };
        const auto k = static_cast<std::size_t>(i * hidden + j);
        expect_same(at(layout::gate_column(i, width)) == tensors.at(expert_name(expert, "gate_proj")).values[k]);
        expect_same(at(layout::up_column(i, width)) == tensors.at(expert_name(expert, "up_proj")).values[k]);
        expect_same(down.data[slot * down.group_stride + j * down.row_stride + i * down.col_stride].bits ==
                    tensors.at(expert_name(expert, "down_proj")).values[static_cast<std::size_t>(j * width + i)]);
      }
    }
  });
  CHECK(read_model(folder / "export") == tensors);
  const std::string index = read_file(folder / "export/model.safetensors.index.json");
  CHECK(contains(index, "\"total_size\":" + std::to_string(3 * experts * width * hidden * 2)));
  const auto parsed = ck::detail::weight_map_of(folder / "export", {});
  CHECK(parsed.size() == tensors.size());
  for (const auto& [name, file] : parsed) {
    CHECK(ck::read_safetensors_header(folder / ("export/" + file)).find(name) != nullptr);
    CHECK(file.size() == std::string("model-00001-of-00005.safetensors").size());
  }
}

TEST_CASE("fused experts load into a layer's weights and are exported unchanged, in one file") {
  temporary_folder folder;
  fs::create_directories(folder / "model");
  const std::string up_name = "model.layers.0.mlp.experts.gate_up_proj";
  const std::string down_name = "model.layers.0.mlp.experts.down_proj";
  const model tensors{{up_name, make(up_name, {experts, hidden, 2 * width})},
                      {down_name, make(down_name, {experts, width, hidden})}};
  write_shard(folder / "model/model.safetensors", tensors);
  const ts::box up_extents = ts::box::whole({experts, hidden, 2 * width});  // in_out: as GPT-OSS stores it
  const ts::box down_extents = ts::box::whole({experts, width, hidden});
  ck::name_map names;
  names.whole("up", up_extents, up_name).whole("down", down_extents, down_name);
  using layout = ts::weight_layout::in_out_interleaved;
  round_trip(folder.str(), names, up_extents, down_extents, 1 << 20, [&](layer_rank& layer, int slot, int expert) {
    const auto up = layout::up(layer.up.data(), 2 * width, hidden, 0);
    for (int i = 0; i < width; ++i) {
      for (int j = 0; j < hidden; ++j) {
        const auto at = [&](std::int64_t column) {
          return up.data[slot * up.group_stride + column * up.row_stride + j * up.col_stride].bits;
        };
        const auto k = static_cast<std::size_t>((expert * hidden + j) * 2 * width + 2 * i);
        expect_same(at(layout::gate_column(i, width)) == tensors.at(up_name).values[k]);
        expect_same(at(layout::up_column(i, width)) == tensors.at(up_name).values[k + 1]);
      }
    }
  });
  CHECK(read_model(folder / "export") == tensors);
  CHECK(fs::exists(folder / "export/model.safetensors"));
  CHECK_FALSE(fs::exists(folder / "export/model.safetensors.index.json"));
}

TEST_CASE("a map that does not fit the model is refused with the names") {
  temporary_folder folder;
  const ts::box whole = ts::box::whole({2, 3});
  write_shard(folder / "model.safetensors", {{"a", make("a", {2, 3})}, {"b", make("b", {1, 3})}});
  const auto refused = [&](const ck::name_map& names) {
    return message_of<ts::checkpoint_error>([&] { ck::hugging_face_manifest(folder.str(), names); });
  };
  CHECK(refused(ck::name_map().whole("w", whole, "a")).empty());
  CHECK(contains(refused(ck::name_map().whole("w", whole, "c")), "the model has no tensor 'c', which 'w' needs"));
  CHECK(contains(refused(ck::name_map().whole("w", whole, "b")), "tensor 'b' is [1, 3], expected [2, 3]"));
  CHECK(contains(refused(ck::name_map().per_expert("w", ts::box::whole({1, 2, 3}), 0, 1, "b{}")), "no tensor 'b0'"));
  ts::box row = whole;
  row.size[0] = 1;
  CHECK(contains(refused(ck::name_map().part("w", whole, {"b", {1, 3}, row})),
                 "tensor 'w': its 1 chunks do not cover it once: element [1, 0] is in 0"));
  CHECK(contains(message_of<ts::invalid_argument>([&] { ck::name_map().per_expert("w", whole, 0, 3, "b"); }),
                 "has no {}"));
  CHECK(contains(message_of<ts::invalid_argument>([&] {
                   ck::name_map().part("w", whole, {"b", {3, 2}, whole});
                 }),
                 "'b' of the model is [3, 2]"));
}

// python_test.py runs these two with a folder: it reads what the first writes, and writes what the second reads.
TEST_CASE("python: a checkpoint to read" * doctest::skip(std::getenv("TESSERA_PYTHON_FOLDER") == nullptr)) {
  const std::string folder = std::getenv("TESSERA_PYTHON_FOLDER");
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    std::vector<float> w(6);
    for (int i = 0; i < 6; ++i) w[static_cast<std::size_t>(i)] = static_cast<float>(comm.rank() * 6 + i);
    const std::vector<std::int64_t> ids{1, -2, 3};
    const ts::box whole = ts::box::whole({4, 3});
    const std::vector<ck::source_piece> pieces{
        ck::piece_of("w", std::as_const(w).data(), whole, chunk_of(whole, 0, comm.rank(), 2)),
        ck::piece_of("ids", ids.data(), ts::box::whole({3}))};
    ck::saver saver(comm, {.directory = folder + "/run"});
    const std::string path = saver.save(ck::make_plan(comm, pieces), pieces, {.step = 3});
    ck::name_map names;
    names.whole("w", whole, "model.w.weight").whole("ids", ts::box::whole({3}), "model.ids");
    ck::export_hugging_face(comm, path, names, folder + "/export");
  });
}

TEST_CASE("python: a model to load" * doctest::skip(std::getenv("TESSERA_PYTHON_FOLDER") == nullptr)) {
  const std::string folder = std::string(std::getenv("TESSERA_PYTHON_FOLDER")) + "/model";
  std::vector<float> w(12);
  ck::name_map names;
  names.per_expert("w", ts::box::whole({3, 2, 2}), 0, 2, "experts.{}.w");
  ts::comm::threads::run(1, [&](ts::comm::threads& comm) {
    const std::vector<ck::target_piece> targets{ck::piece_of("w", w.data(), ts::box::whole({3, 2, 2}))};
    ck::load(comm, folder, ck::hugging_face_manifest(comm, folder, names), targets);
  });
  for (int i = 0; i < 12; ++i) CHECK(w[static_cast<std::size_t>(i)] == static_cast<float>(i) + 0.5F);
}

}  // namespace
