// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <sys/stat.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/comm/self.hpp>

#include "checkpoint_case.hpp"
#include "fuzz/parsers.hpp"

using namespace tessera_test;

namespace {

static_assert(ck::element_type_of<float>() == ck::element_type::f32);
static_assert(ck::element_type_of<const ts::bfloat16>() == ck::element_type::bf16);
static_assert(ck::element_type_of<std::uint16_t>() == ck::element_type::u16);
static_assert(ck::element_type_of<bool>() == ck::element_type::boolean);
static_assert(name_of(ck::element_type::bf16) == ts::dtype_name<ts::bfloat16>());
static_assert(ck::element_type_named("F8_E5M2") == ck::element_type::f8_e5m2);
static_assert(!ck::element_type_named("F32 "));

TEST_CASE("blocks of a chunk are neighbours in the file, tile it, and fit their size where an element does") {
  for (const ts::box& whole : {ts::box::whole({}), ts::box::whole({1000}), ts::box::whole({7, 300}),
                               ts::box::whole({3, 5, 1100}), ts::box::whole({2, 3, 4, 500}), ts::box::whole({9, 1, 1}),
                               ts::box::whole({5, 0, 3}), ts::box::whole({1, 4096})}) {
    for (const std::int64_t block : {8, 24, 4096, 100000}) {
      const ck::detail::slab_division slabs(whole, 8, block);
      std::int64_t next = 0;
      for (std::int64_t k = 0; k < slabs.count(); ++k) {
        const ts::box slab = slabs[k];
        REQUIRE(whole.contains(slab));
        CHECK(whole.local_offset(slab) == next);
        CHECK(whole.contiguous_run(slab) == slab.volume());
        CHECK(slab.volume() * 8 <= block);
        next += slab.volume();
      }
      CHECK(next == whole.volume());
    }
  }
}

TEST_CASE("copies of boxes agree with element by element copies for all extents, places and strides") {
  for (int trial = 0; trial < 300; ++trial) {
    std::mt19937 random(static_cast<unsigned>(trial));
    const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    const int rank = pick(5);
    ts::box part;
    ts::box from;
    ts::box to;
    part.rank = from.rank = to.rank = rank;
    for (int i = 0; i < rank; ++i) {
      part.size[i] = 1 + pick(4);
      part.offset[i] = 3 + pick(3);
      for (ts::box* outer : {&from, &to}) {
        const bool exact = pick(2) == 0;
        outer->offset[i] = part.offset[i] - (exact ? 0 : pick(3));
        outer->size[i] = part.offset[i] - outer->offset[i] + part.size[i] + (exact ? 0 : pick(3));
      }
    }
    const std::int64_t gap = 1 + pick(2);  // between elements of the target
    ck::detail::stride_array to_strides = ck::detail::packed_strides(to);
    for (auto& stride : to_strides) stride *= gap;
    std::vector<std::uint16_t> source(static_cast<std::size_t>(from.volume()));
    for (auto& value : source) value = static_cast<std::uint16_t>(random());
    std::vector<std::uint16_t> target(static_cast<std::size_t>(to.volume() * gap), 7);
    std::vector<std::uint16_t> expected = target;
    for (std::int64_t i = 0; i < part.volume(); ++i) {
      std::int64_t index[ts::max_box_rank] = {};
      std::int64_t rest = i;
      for (int d = rank - 1; d >= 0; --d) {
        index[d] = part.offset[d] + rest % part.size[d];
        rest /= part.size[d];
      }
      expected[static_cast<std::size_t>(to.local_offset(index) * gap)] =
          source[static_cast<std::size_t>(from.local_offset(index))];
    }
    ck::detail::copy_box(part, source.data(), from, ck::detail::packed_strides(from), target.data(), to, to_strides, 2);
    CHECK(target == expected);
  }
}

TEST_CASE("tilings are told from coverings with holes or overlaps, and the first wrong element is named") {
  const ts::box whole = ts::box::whole({6, 7, 2});
  for (unsigned trial = 0; trial < 400; ++trial) {
    std::mt19937 random(trial);
    // cut at random, then perhaps move, drop or repeat a part
    std::vector<ts::box> parts{whole};
    for (int cut = 0; cut < 8; ++cut) {
      ts::box& part = parts[random() % parts.size()];
      const auto d = static_cast<int>(random() % 3);
      if (part.size[d] < 2) continue;
      ts::box rest = part;
      part.size[d] = 1 + static_cast<std::int64_t>(random()) % (part.size[d] - 1);
      rest.offset[d] += part.size[d];
      rest.size[d] -= part.size[d];
      parts.push_back(rest);
    }
    const unsigned damage = trial % 4;
    ts::box& victim = parts[random() % parts.size()];
    if (damage == 1) victim.size[random() % 3] = 0;
    if (damage == 2) parts.push_back(victim);
    if (damage == 3) {
      const auto d = static_cast<int>(random() % 3);
      victim.offset[d] = static_cast<std::int64_t>(random()) % (whole.size[d] - victim.size[d] + 1);
    }
    std::string first;
    for_each_element(whole, whole, [&](std::int64_t, std::int64_t flat) {
      const std::int64_t index[] = {flat / 14, flat / 2 % 7, flat % 2};
      std::int64_t count = 0;
      for (const ts::box& part : parts) count += part.contains(index) ? 1 : 0;
      if (count != 1 && first.empty()) {
        first = "element [" + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " +
                std::to_string(index[2]) + "] is in " + std::to_string(count) + " ";
      }
    });
    const std::string told = ck::detail::find_tiling_error(whole, parts);
    CHECK(told.substr(0, first.size()) == first);
    CHECK(told.empty() == first.empty());
  }
}

TEST_CASE("a plan writes each element once and gives replicas equal shares") {
  for (const auto& [ranks, ep] : std::vector<std::pair<int, int>>{{1, 1}, {4, 1}, {4, 4}, {6, 3}, {8, 2}}) {
    const ck::save_plan plan = model_plan(ranks, ep);
    std::int64_t bytes = 0;
    for (const ck::planned_tensor& tensor : plan.tensors) {
      std::vector<int> count(static_cast<std::size_t>(tensor.whole.volume()));
      for (std::int64_t i = tensor.first_chunk; i < tensor.first_chunk + tensor.num_chunks; ++i) {
        const ck::planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(i)];
        bool holds = chunk.part.empty();
        for (const ck::piece_info& piece : model_pieces(chunk.writer, ranks, ep)) {
          holds = holds || (piece.name == tensor.name && piece.part.contains(chunk.part));
        }
        CHECK(holds);
        for_each_element(tensor.whole, chunk.part,
                         [&](std::int64_t, std::int64_t flat) { ++count[static_cast<std::size_t>(flat)]; });
      }
      CHECK(std::all_of(count.begin(), count.end(), [](int c) { return c == 1; }));
      bytes += tensor.whole.volume() * size_of(tensor.type);
    }
    std::int64_t planned = 0;
    for (const std::int64_t b : plan.bytes) planned += b;
    CHECK(planned == bytes);
    CHECK(plan.digest == model_plan(ranks, ep).digest);
    if (ranks > 1) CHECK(plan.digest != model_plan(ranks, ranks == ep ? 1 : ranks).digest);
  }
  // all the same on all ranks: shares differ by one piece at most
  const ts::box whole = ts::box::whole({1000, 10});
  const auto replicated = [&](int) {
    std::vector<ck::piece_info> pieces;
    for (int i = 0; i < 5; ++i) pieces.push_back({"t" + std::to_string(i), ck::element_type::f32, whole, whole, ""});
    return pieces;
  };
  const ck::save_plan plan = ck::make_plan(8, replicated, {.split_bytes = 8000, .block_bytes = 4096});
  const auto [least, most] = std::minmax_element(plan.bytes.begin(), plan.bytes.end());
  CHECK(*most - *least <= 8000);
  CHECK(*most <= 5 * 40000 / 8 + 8000);
}

TEST_CASE("a plan refuses holes, contradictions and pieces held twice, and says which") {
  const ts::box whole = ts::box::whole({4, 4});
  const ck::piece_info all{"w", ck::element_type::f32, whole, whole, ""};
  const auto refused = [](std::vector<std::vector<ck::piece_info>> pieces) {
    return message_of<ts::invalid_argument>([&] { ck::make_plan(pieces); });
  };
  ck::piece_info part = all;
  part.part.size[1] = 3;
  CHECK(contains(refused({{part}}),
                 "'w' [0, 4) x [0, 4): the parts that ranks hold do not cover it: element [0, 3] is "
                 "in 0"));
  CHECK(contains(refused({{all}, {part}}), "element [0, 0] is in 2"));  // not along dimension 0
  ck::piece_info other = all;
  other.type = ck::element_type::i32;
  CHECK(contains(refused({{all}, {other}}), "F32 [0, 4) x [0, 4) on rank 0 and I32 [0, 4) x [0, 4) on rank 1"));
  CHECK(contains(refused({{all, all}}), "rank 0 holds the part [0, 4) x [0, 4) twice"));
  part.part.offset[0] = 1;
  CHECK(contains(refused({{part}}), "does not lie in its extent"));
  part.part = whole;
  part.name = "__metadata__";
  CHECK(contains(refused({{part}}), "__metadata__"));
  CHECK(contains(refused({}), "at least 1 rank"));
}

TEST_CASE("entries are called as no other tensor of the plan") {
  const ts::box whole = ts::box::whole({4});
  ts::box low = whole;
  low.size[0] = 2;
  ts::box high = low;
  high.offset[0] = 2;
  const auto piece = [&](const char* name, const ts::box& part) {
    return ck::piece_info{name, ck::element_type::f32, whole, part, ""};
  };
  const ck::save_plan plan = ck::make_plan({{piece("w", low), piece("w.0", whole)}, {piece("w", high)}});
  CHECK(plan.chunks[0].entry == "w.0_");
  CHECK(plan.chunks[1].entry == "w.1");
  CHECK(plan.chunks[2].entry == "w.0");
}

TEST_CASE("the training state comes back as it was, to the last bit") {
  ck::manifest content;
  content.block_bytes = 4096;
  content.state = {.step = 123456789012,
                   .learning_rate = 0.1 + 1e-17 * 3,
                   .rng = "1 2 3\n\t\"\\",
                   .data_cursor = "\xc3\xa9",
                   .values = {{"", "x"}, {"a", ""}}};
  for (const double rate : {0.1, 5e-324, 1.7976931348623157e308, -0.0, 3e-4, 1.0 / 3}) {
    content.state.learning_rate = rate;
    const ck::manifest back = ck::parse_manifest(ck::to_json(content), "text");
    CHECK(back == content);
    CHECK(std::signbit(back.state.learning_rate) == std::signbit(rate));
  }
  content.state.learning_rate = std::numeric_limits<double>::quiet_NaN();
  CHECK(contains(message_of<ts::invalid_argument>([&] { ck::to_json(content); }), "must be finite"));
  content.state.learning_rate = 1;
  content.state.rng = "\xff";
  CHECK(contains(message_of<ts::invalid_argument>([&] { ck::to_json(content); }), "UTF-8"));
}

TEST_CASE("the corpus of the fuzzer is read or refused as its names say") {
  int count = 0;
  for (const auto& entry : fs::directory_iterator(TESSERA_FUZZ_CORPUS)) {
    const std::string name = entry.path().filename().string();
    CAPTURE(name);
    const std::string input = read_file(entry.path().string());
    CHECK((read_as_safetensors(input) || read_as_manifest(input)) == (name.rfind("ok-", 0) == 0));
    ++count;
  }
  CHECK(count >= 30);
}

// A checkpoint of two ranks, loaded by one into memory that must not change.
class damaged_checkpoint {
 public:
  damaged_checkpoint() : path_(folder_ / "step-4") {
    const ck::save_plan plan = model_plan(1, 1);
    ts::comm::self<ts::space::host> comm;
    const model_rank model(0, 1, 1, 3);
    ck::saver saver(comm, {.directory = folder_.str(), .sync = false});
    saver.save(plan, model.sources(), {.step = 4});
    shard_ = read_file(shard_path());
    manifest_ = read_file(manifest_path());
  }

  std::string shard_path() const { return path_ + "/rank-00000.safetensors"; }
  std::string manifest_path() const { return path_ + "/manifest.json"; }
  const std::string& shard() const { return shard_; }
  const std::string& manifest() const { return manifest_; }

  // What loading says with these files.
  std::string load(const std::string& shard, const std::string& manifest) {
    write_file(shard_path(), shard);
    write_file(manifest_path(), manifest);
    return load();
  }
  std::string load() {
    ts::comm::self<ts::space::host> comm;
    model_rank model(0, 1, 1, 0);
    const std::string text = message_of<ts::checkpoint_error>([&] { ck::load(comm, path_, model.targets()); });
    REQUIRE((text.empty() ? model.differences(3) == 0 : model.is_untouched()));
    return text;
  }

 private:
  temporary_folder folder_;
  std::string path_;
  std::string shard_;
  std::string manifest_;
};

TEST_CASE("every flipped bit of a file is found before any memory changes") {
  damaged_checkpoint damaged;
  CHECK(damaged.load().empty());
  int found = 0;
  const std::size_t header = 2000;  // all of the header, and samples of the elements
  for (std::size_t i = 0; i < damaged.shard().size(); i += i < header ? 7 : 97) {
    std::string shard = damaged.shard();
    shard[i] = static_cast<char>(shard[i] ^ (1 << (i % 8)));
    const std::string text = damaged.load(shard, damaged.manifest());
    CHECK(contains(text, "rank-00000.safetensors"));
    ++found;
  }
  CHECK(found > 500);
}

TEST_CASE("every flipped bit of a manifest is found, or changes nothing that it says") {
  damaged_checkpoint damaged;
  int found = 0;
  for (std::size_t i = 0; i < damaged.manifest().size(); i += 3) {
    std::string manifest = damaged.manifest();
    manifest[i] = static_cast<char>(manifest[i] ^ (1 << (i % 7)));
    const std::string text = damaged.load(damaged.shard(), manifest);
    if (!text.empty()) ++found;
    if (i + 1 < manifest.size()) CHECK(contains(text, "manifest.json"));  // the last is the end of the line
  }
  CHECK(found > 500);
}

TEST_CASE("truncated, missing and exchanged files are told by name") {
  damaged_checkpoint damaged;
  for (const std::size_t length : {std::size_t{0}, std::size_t{5}, std::size_t{100}, damaged.shard().size() - 1}) {
    const std::string text = damaged.load(damaged.shard().substr(0, length), damaged.manifest());
    CHECK(contains(text, "rank-00000.safetensors"));
    CHECK(contains(text, "truncated"));
  }
  CHECK(contains(damaged.load(damaged.shard() + "x", damaged.manifest()), "rank-00000.safetensors: it has"));
  write_file(damaged.shard_path(), damaged.shard());
  for (const std::size_t length : {std::size_t{0}, std::size_t{50}, damaged.manifest().size() - 2}) {
    CHECK(contains(damaged.load(damaged.shard(), damaged.manifest().substr(0, length)), "manifest.json"));
  }
  write_file(damaged.manifest_path(), damaged.manifest());
  fs::remove(damaged.shard_path());
  CHECK(contains(damaged.load(), "rank-00000.safetensors: cannot be opened"));
  fs::create_directory(damaged.shard_path());
  CHECK(contains(damaged.load(), "not a regular file"));
  fs::remove(damaged.shard_path());
  REQUIRE(::mkfifo(damaged.shard_path().c_str(), 0600) == 0);  // nobody will ever write to it
  CHECK(contains(damaged.load(), "rank-00000.safetensors: this is not a regular file"));
  fs::remove(damaged.manifest_path());
  REQUIRE(::mkfifo(damaged.manifest_path().c_str(), 0600) == 0);
  CHECK(contains(damaged.load(), "manifest.json: this is not a regular file"));
}

TEST_CASE("a file whose header says something else than the manifest is refused, with the tensor's name") {
  damaged_checkpoint damaged;
  const auto edited = [&](const std::string& from, const std::string& to) {
    std::string shard = damaged.shard();
    const std::size_t place = shard.find(from);
    REQUIRE(place != std::string::npos);
    REQUIRE(from.size() == to.size());
    return damaged.load(shard.replace(place, from.size(), to), damaged.manifest());
  };
  CHECK(contains(edited("\"embedding\":{\"dtype\":\"F32\"", "\"embedding\":{\"dtype\":\"I32\""),
                 "tensor 'embedding' has elements I32, the manifest says F32"));
  CHECK(contains(edited("\"shape\":[13,5]", "\"shape\":[5,13]"), "tensor 'embedding' has other extents"));
  CHECK(contains(edited("\"embedding\"", "\"embeddinG\""), "tensor 'embedding' should be here as 'embedding'"));
  CHECK(contains(edited("\"format\":\"tessera\"", "\"format\":\"tesserA\""), "the checksum of its header is wrong"));
}

TEST_CASE("a manifest that contradicts itself is refused, though its checksum is right") {
  damaged_checkpoint damaged;
  const auto edited = [&](auto&& edit) {
    ck::manifest content = ck::parse_manifest(damaged.manifest(), "manifest");
    edit(content);
    return damaged.load(damaged.shard(), ck::to_json(content));
  };
  const auto find = [](ck::manifest& content, const char* name) -> ck::manifest_tensor& {
    return const_cast<ck::manifest_tensor&>(*content.find(name));
  };
  const std::string overlap =
      edited([&](ck::manifest& m) { find(m, "embedding").chunks[0].begin = find(m, "wide").chunks[0].begin + 4; });
  CHECK(contains(overlap, "manifest.json: tensors '"));
  CHECK(contains(overlap, "overlap in 'rank-00000.safetensors'"));
  CHECK(contains(edited([&](ck::manifest& m) { find(m, "bytes").chunks[0].begin = 1 << 30; }),
                 "tensor 'bytes': the chunk [0, 3) would have 3 bytes from byte"));
  CHECK(contains(edited([&](ck::manifest& m) { find(m, "gate").chunks.push_back(find(m, "gate").chunks[0]); }),
                 "tensor 'gate': its 2 chunks do not cover it once: element [0, 0] is in 2 of them"));
  CHECK(contains(edited([&](ck::manifest& m) { find(m, "gate").chunks.clear(); }), "tensor 'gate': its 0 chunks"));
  CHECK(contains(edited([&](ck::manifest& m) { find(m, "wide").type = ck::element_type::f64; }), "tensor 'wide'"));
  CHECK(contains(edited([&](ck::manifest& m) { std::swap(m.tensors[0], m.tensors[1]); }), "in order of their names"));
  CHECK(contains(edited([&](ck::manifest& m) { m.files[0].name = "a/b"; }), "no name of a file"));
  // chunks exchanged: same extents and types, so only their names in the file and their checksums tell
  CHECK(contains(edited([&](ck::manifest& m) {
                   find(m, "experts.up").type = find(m, "experts.down").type;
                   find(m, "gate").chunks[0].entry = "wide";
                 }),
                 "tensor 'gate'"));
}

TEST_CASE("what is not in a checkpoint, or is something else there, is refused") {
  damaged_checkpoint damaged;
  ts::comm::self<ts::space::host> comm;
  std::vector<double> memory(100, 1.5);
  const auto load = [&](const char* name, const ts::box& whole) {
    const std::vector<ck::target_piece> targets{ck::piece_of(name, memory.data(), whole)};
    return message_of<ts::checkpoint_error>(
        [&] { ck::load(comm, fs::path(damaged.shard_path()).parent_path().string(), targets); });
  };
  CHECK(contains(load("embeding", ts::box::whole({13, 5})), "there is no tensor 'embeding'"));
  CHECK(contains(load("embedding", ts::box::whole({13, 5})),
                 "tensor 'embedding' is F32 [0, 13) x [0, 5), rank 0 wants it as F64 [0, 13) x [0, 5)"));
  CHECK(contains(load("gate", ts::box::whole({5, 13})), "tensor 'gate' is F64 [0, 12) x [0, 40)"));
  CHECK(std::all_of(memory.begin(), memory.end(), [](double x) { return x == 1.5; }));
}

TEST_CASE(
    "the checkpoint to go on from is the one that latest names, or the newest that is whole, never a partial one") {
  temporary_folder folder;
  std::string notes;
  const ts::log_sink log([](void* context, ts::log_level,
                            std::string_view text) { *static_cast<std::string*>(context) += std::string(text) + "\n"; },
                         &notes);
  const auto found = [&] {
    notes.clear();
    const auto path = ck::find_checkpoint(folder.str(), log);
    return path ? fs::path(*path).filename().string() : "";
  };
  CHECK(found() == "");
  CHECK(ck::find_checkpoint(folder / "none") == std::nullopt);
  ts::comm::self<ts::space::host> comm;
  const model_rank model(0, 1, 1, 1);
  ck::saver saver(comm, {.directory = folder.str(), .sync = false});
  for (const int step : {8, 9, 10}) saver.save(model_plan(1, 1), model.sources(), {.step = step});
  CHECK(read_file(folder / "latest") == "step-10\n");
  CHECK(found() == "step-10");
  CHECK(notes.empty());

  write_file(folder / "latest", "step-9\n");
  CHECK(found() == "step-9");
  for (const char* text : {"", "step-11", "step-", "../step-10", "step-010", "step-9x"}) {
    write_file(folder / "latest", text);
    CHECK(found() == "step-10");
    CHECK_FALSE(notes.empty());
  }
  fs::remove(folder / "latest");
  CHECK(found() == "step-10");
  CHECK(contains(notes, "latest: cannot be opened"));

  fs::copy(folder / "step-10", folder / "step-11.tmp-0123456789abcdef");
  fs::copy(folder / "step-10", folder / "step-12");
  fs::remove(folder / "step-12/manifest.json");
  fs::resize_file(folder / "step-10/rank-00000.safetensors", 500);
  CHECK(found() == "step-9");
  CHECK(contains(notes, "step-12/manifest.json: cannot be opened"));
  CHECK(contains(notes, "truncated"));

  saver.save(model_plan(1, 1), model.sources(), {.step = 10});  // over the damaged one
  CHECK(found() == "step-10");
  CHECK(notes.empty());
  CHECK_FALSE(fs::exists(folder / "step-11.tmp-0123456789abcdef"));
}

TEST_CASE("where no checkpoint is whole that is an error, not a run that has none yet") {
  temporary_folder folder;
  ts::comm::self<ts::space::host> comm;
  model_rank model(0, 1, 1, 1);
  ck::saver saver(comm, {.directory = folder.str(), .sync = false});
  saver.save(model_plan(1, 1), model.sources(), {.step = 3});
  write_file(folder / "step-3/manifest.json", "{");
  const auto refused = [&] { return message_of<ts::checkpoint_error>([&] { ck::find_checkpoint(folder.str()); }); };
  CHECK(contains(refused(), "no checkpoint in " + folder.str() + " is whole: "));
  CHECK(contains(refused(), "step-3/manifest.json"));
  CHECK_THROWS_AS(ck::resume(comm, folder.str(), model.targets()), ts::checkpoint_error);
  saver.save(model_plan(1, 1), model.sources(), {.step = 4});
  write_file(folder / "step-4/manifest.json", "{");
  CHECK(contains(refused(), "step-4/manifest.json"));  // of several the first that was looked at
  const auto save = [&](std::int64_t step) {
    return message_of<ts::error>([&] { saver.save(model_plan(1, 1), model.sources(), {.step = step}); });
  };
  CHECK(contains(save(1'000'000'000'000'000'000), "it must be 0 to 999999999999999999"));
  CHECK(contains(ck::step_name(999'999'999'999'999'999), "999999999999999999"));
  fs::remove_all(folder / "step-3");
  fs::remove_all(folder / "step-4");
  write_file(folder / "latest", "step-9\n");
  CHECK(contains(refused(), "step-9"));  // what `latest` names has gone, and nothing else is there
}

TEST_CASE("a manifest that loading would refuse is not published, and nothing older is deleted") {
  temporary_folder folder;
  ts::comm::self<ts::space::host> comm;
  const model_rank model(0, 1, 1, 1);
  ck::saver saver(comm, {.directory = folder.str(), .keep_last = 1, .sync = false});
  ck::save_plan plan = model_plan(1, 1);
  saver.save(plan, model.sources(), {.step = 1});
  plan.block_bytes *= 1 << 30;  // beyond max_block_bytes
  CHECK(contains(message_of<ts::checkpoint_error>([&] { saver.save(plan, model.sources(), {.step = 2}); }),
                 "manifest.json: block_bytes is "));
  CHECK(ck::list_steps(folder.str()) == std::vector<std::int64_t>{1});
  CHECK(ck::find_checkpoint(folder.str()) == folder / "step-1");
}

TEST_CASE("parts are whole where the size to split at is as large as can be") {
  const std::vector<float> values(100);
  const std::vector<ck::source_piece> pieces{ck::piece_of("w", values.data(), ts::box::whole({100}))};
  ts::comm::self<ts::space::host> comm;
  const auto chunks = [&](std::int64_t split_bytes) {
    return ck::make_plan(comm, pieces, {.split_bytes = split_bytes}).chunks.size();
  };
  CHECK(chunks(std::numeric_limits<std::int64_t>::max()) == 1);
  CHECK(chunks(1 << 20) == 1);
}

TEST_CASE("old checkpoints are deleted, but never the one that latest names") {
  temporary_folder folder;
  ts::comm::self<ts::space::host> comm;
  const model_rank model(0, 1, 1, 1);
  const auto save = [&](int step, int keep) {
    ck::saver saver(comm, {.directory = folder.str(), .keep_last = keep, .sync = false});
    saver.save(model_plan(1, 1), model.sources(), {.step = step});
    return ck::list_steps(folder.str());
  };
  using steps = std::vector<std::int64_t>;
  for (const int step : {5, 6, 7}) save(step, 0);
  CHECK(save(20, 2) == steps{7, 20});
  CHECK(save(100, 3) == steps{7, 20, 100});
  CHECK(save(1, 2) == steps{1, 20, 100});  // the newest, though of the lowest step: 7 was one too many
  CHECK(save(2, 1) == steps{2, 100});
  CHECK(read_file(folder / "latest") == "step-2\n");
}

}  // namespace
