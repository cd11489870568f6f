// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/comm/threads.hpp>
#include <tessera/layout/layout.hpp>
#include <tessera/mesh/mesh.hpp>

#include "checkpoint_case.hpp"

using namespace tessera_test;

namespace {

struct split {
  int ranks;
  int ep;
};

std::vector<split> all_splits() {
  std::vector<split> splits;
  for (const int ranks : {1, 2, 3, 4, 8}) {
    for (int ep = 1; ep <= ranks; ++ep) {
      if (ranks % ep == 0) splits.push_back({ranks, ep});
    }
  }
  return splits;
}

// Records which bytes of which file were accessed, on all ranks.
class access_log {
 public:
  ck::io_observer observer(ck::io_kind kind) {
    return [this, kind](const ck::io_event& event) {
      if (event.kind != kind || event.bytes == 0 || !contains(std::string(event.path), ".safetensors")) return;
      const std::lock_guard lock(mutex_);
      ranges_[fs::path(event.path).filename().string()].push_back({event.offset, event.offset + event.bytes});
    };
  }

  // Bytes at or beyond `begin_of(file)`; -1 if one was accessed twice.
  template <class BeginOf>
  std::int64_t bytes_once(BeginOf&& begin_of) {
    std::int64_t total = 0;
    for (auto& [file, ranges] : ranges_) {
      const std::int64_t begin = begin_of(file);
      std::sort(ranges.begin(), ranges.end());
      std::int64_t end = begin;
      for (const auto& [from, to] : ranges) {
        if (to <= begin) continue;  // a header
        if (from < end) return -1;
        total += to - from;
        end = to;
      }
    }
    return total;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::vector<std::pair<std::int64_t, std::int64_t>>> ranges_;
};

std::int64_t data_begin(const std::string& folder, const std::string& file) {
  return ck::read_safetensors_header(folder + "/" + file).data_begin;
}

void save_model(const std::string& folder, split s, std::uint64_t version, std::int64_t step,
                const ck::io_observer& observer = {}) {
  const ck::save_plan plan = model_plan(s.ranks, s.ep);
  ts::comm::threads::run(s.ranks, [&](ts::comm::threads& comm) {
    const model_rank model(comm.rank(), s.ranks, s.ep, version);
    ck::saver saver(comm, {.directory = folder, .sync = false, .observer = observer});
    saver.save(plan, model.sources(), {.step = step, .learning_rate = 0.1 * static_cast<double>(version)});
  });
}

TEST_CASE("a checkpoint of any number of ranks and any split loads bitwise on any other, and each byte moves once") {
  temporary_folder folder;
  const std::vector<split> splits = all_splits();
  for (std::size_t i = 0; i < splits.size(); ++i) {
    access_log written;
    save_model(folder.str(), splits[i], i + 1, static_cast<std::int64_t>(i), written.observer(ck::io_kind::write));
    const std::string path = folder / ck::step_name(static_cast<std::int64_t>(i));
    const auto begin = [&](const std::string& file) { return data_begin(path, file); };
    CHECK(written.bytes_once(begin) == model_bytes());
  }
  for (std::size_t i = 0; i < splits.size(); ++i) {
    const std::string path = folder / ck::step_name(static_cast<std::int64_t>(i));
    for (const split& to : splits) {
      CAPTURE(splits[i].ranks);
      CAPTURE(splits[i].ep);
      CAPTURE(to.ranks);
      CAPTURE(to.ep);
      access_log read;
      std::atomic<std::int64_t> differences{0};
      std::atomic<std::int64_t> told{0};
      ts::comm::threads::run(to.ranks, [&](ts::comm::threads& comm) {
        model_rank model(comm.rank(), to.ranks, to.ep, 0);
        const ck::load_result result =
            ck::load(comm, path, model.targets(), {.observer = read.observer(ck::io_kind::read)});
        differences += model.differences(i + 1);
        told += result.bytes_read;
        if (result.state.step != static_cast<std::int64_t>(i)) ++differences;
        if (result.state.learning_rate != 0.1 * static_cast<double>(i + 1)) ++differences;
      });
      CHECK(differences == 0);
      CHECK(told == model_bytes());
      CHECK(read.bytes_once([&](const std::string& file) { return data_begin(path, file); }) == model_bytes());
    }
  }
}

TEST_CASE("experts of one layout load into any other, replicas included") {
  temporary_folder folder;
  constexpr int experts = 8;
  const ts::box whole = ts::box::whole({experts, 3, 5});
  const auto value = [](std::int64_t flat) { return static_cast<float>(flat) + 0.25F; };
  const ts::layout::block from(experts, 2);
  const ts::layout::table_storage storage(experts, {{0, 1, 2, 3}, {2, 3, 4, 5}, {7, 6}});  // experts 2 and 3 twice
  const ts::layout::table to = storage.view();
  const auto save = [&](auto& comm, const auto& placement, const std::string& directory) {
    std::vector<float> local(static_cast<std::size_t>(placement.num_slots(comm.rank()) * 15));
    for (int slot = 0; slot < placement.num_slots(comm.rank()); ++slot) {
      for (int i = 0; i < 15; ++i) {
        local[static_cast<std::size_t>(slot * 15 + i)] = value(placement.expert_at(comm.rank(), slot) * 15 + i);
      }
    }
    const auto pieces = ck::expert_pieces("up", std::as_const(local).data(), whole, placement, comm.rank());
    ck::saver saver(comm, {.directory = directory, .sync = false});
    saver.save(ck::make_plan(comm, pieces), pieces, {.step = 1});
  };
  const auto load = [&](auto& comm, const auto& placement, const std::string& directory) {
    std::vector<float> local(static_cast<std::size_t>(placement.num_slots(comm.rank()) * 15));
    const auto pieces = ck::expert_pieces("up", local.data(), whole, placement, comm.rank());
    const auto result = ck::resume(comm, directory, pieces);
    bool right = result.has_value();
    for (int slot = 0; slot < placement.num_slots(comm.rank()); ++slot) {
      for (int i = 0; i < 15; ++i) {
        right = right && local[static_cast<std::size_t>(slot * 15 + i)] ==
                             value(placement.expert_at(comm.rank(), slot) * 15 + i);
      }
    }
    if (!right) throw std::runtime_error("wrong experts");
  };
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) { save(comm, from, folder / "block"); });
  ts::comm::threads::run(3, [&](ts::comm::threads& comm) { load(comm, to, folder / "block"); });
  ts::comm::threads::run(3, [&](ts::comm::threads& comm) { save(comm, to, folder / "table"); });
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) { load(comm, from, folder / "table"); });
  CHECK(ck::list_steps(folder / "table") == std::vector<std::int64_t>{1});
}

TEST_CASE("a tensor under any placements loads under any others, strided shards and empty ones included") {
  temporary_folder folder;
  using ts::placement;
  const ts::box whole = ts::box::whole({10, 6});
  const auto value = [](std::int64_t flat) { return static_cast<double>(flat) + 0.5; };
  struct placed {
    ts::mesh ranks;
    ts::placements list;
  };
  const auto two = [](int outer, int inner) {
    return ts::mesh{ts::mesh_axis::named("efsdp", outer), ts::mesh_axis::named("ep", inner)};
  };
  const std::vector<placed> all{{two(1, 1), {placement::replicate(), placement::replicate()}},
                                {two(2, 2), {placement::strided_shard(0, 2), placement::shard(0)}},
                                {two(2, 3), {placement::shard(1), placement::shard(0)}},
                                {two(2, 4), {placement::replicate(), placement::shard(1)}},  // 6 on 4: 2, 2, 2, 0
                                {two(3, 1), {placement::strided_shard(0, 3), placement::replicate()}}};
  // Elements of a rank's local array, told by the regions' own places.
  const auto fill = [&](const placed& on, int rank, std::vector<double>& local) {
    const ts::box extents = ts::local_extents(on.ranks, on.list, rank, whole);
    local.assign(static_cast<std::size_t>(extents.volume()), -1);
    for (const ts::placed_box& part : ts::placed_boxes(on.ranks, on.list, rank, whole)) {
      for_each_element(whole, part.logical, [&](std::int64_t i, std::int64_t flat) {
        const std::int64_t columns = part.local.size[1];
        const std::int64_t index[] = {part.local.offset[0] + i / columns, part.local.offset[1] + i % columns};
        local[static_cast<std::size_t>(extents.local_offset(index))] = value(flat);
      });
    }
  };
  for (std::size_t from = 0; from < all.size(); ++from) {
    const std::string directory = folder / std::to_string(from);
    ts::comm::threads::run(all[from].ranks.size(), [&](ts::comm::threads& comm) {
      std::vector<double> local;
      fill(all[from], comm.rank(), local);
      const auto pieces =
          ck::placed_pieces("w", std::as_const(local).data(), whole, all[from].ranks, all[from].list, comm.rank());
      ck::saver saver(comm, {.directory = directory, .sync = false});
      saver.save(ck::make_plan(comm, pieces), pieces, {});
    });
    for (const placed& to : all) {
      ts::comm::threads::run(to.ranks.size(), [&](ts::comm::threads& comm) {
        std::vector<double> expected;
        fill(to, comm.rank(), expected);
        std::vector<double> local(expected.size(), -2);
        const auto pieces = ck::placed_pieces("w", local.data(), whole, to.ranks, to.list, comm.rank());
        if (!ck::resume(comm, directory, pieces) || local != expected) throw std::runtime_error("wrong elements");
      });
    }
  }
  const ts::mesh one{ts::mesh_axis::named("dp", 2)};
  double element = 0;
  CHECK(contains(message_of<ts::invalid_argument>(
                     [&] { ck::placed_pieces("w", &element, ts::box::whole({1}), one, {placement::partial()}, 0); }),
                 "reduce it before"));
}

TEST_CASE("strided memory is saved and loaded in place") {
  temporary_folder folder;
  const ts::box whole = ts::box::whole({4, 3, 2});
  std::vector<std::int32_t> in(4 * 3 * 2 * 3, -1);
  std::vector<std::int32_t> out(2 * 3 * 4 * 2, -1);
  std::int32_t count = 0;
  for (int a = 0; a < 4; ++a) {
    for (int b = 0; b < 3; ++b) {
      for (int c = 0; c < 2; ++c) in[static_cast<std::size_t>(a * 18 + b * 6 + c * 3)] = count++;
    }
  }
  const ck::piece_info info{"t", ck::element_type::i32, whole, whole, ""};
  ts::comm::threads::run(1, [&](ts::comm::threads& comm) {
    const std::vector<ck::source_piece> sources{{info, in.data(), {18, 6, 3, 0}}};
    ck::saver saver(comm, {.directory = folder.str(), .sync = false});
    const std::string path = saver.save(ck::make_plan(comm, sources), sources, {});
    const std::vector<ck::target_piece> targets{{info, out.data(), {2, 8, 1, 0}}};  // the first two dimensions swapped
    ck::load(comm, path, targets);
  });
  count = 0;
  for (int a = 0; a < 4; ++a) {
    for (int b = 0; b < 3; ++b) {
      for (int c = 0; c < 2; ++c) CHECK(out[static_cast<std::size_t>(a * 2 + b * 8 + c)] == count++);
    }
  }
  CHECK(std::count(out.begin(), out.end(), -1) == 24);
}

TEST_CASE("an asynchronous save holds what was there when it began, and waits for no step") {
  temporary_folder folder;
  const ck::save_plan plan = model_plan(4, 2);
  ts::comm::threads::run(4, [&](ts::comm::threads& comm) {
    model_rank model(comm.rank(), 4, 2, 1);
    ck::saver saver(comm, {.directory = folder.str(), .keep_last = 2});
    for (std::uint64_t version = 1; version <= 5; ++version) {
      model.fill(version);
      saver.save_async(plan, model.sources(), {.step = static_cast<std::int64_t>(version)});
      model.fill(99);  // the next step, while the thread writes
      if (version == 3) {
        while (saver.try_commit().empty()) {
        }
        if (saver.pending()) throw std::runtime_error("nothing should be under way");
      }
    }
    const std::string path = saver.wait();
    if (path != folder / "step-5" || !saver.wait().empty()) throw std::runtime_error("wait told " + path);
    model_rank loaded(comm.rank(), 4, 2, 0);
    const auto result = ck::resume(comm, folder.str(), loaded.targets());
    if (!result || result->state.step != 5 || loaded.differences(5) != 0) throw std::runtime_error("wrong checkpoint");
  });
  CHECK(ck::list_steps(folder.str()) == std::vector<std::int64_t>{4, 5});
}

TEST_CASE("a failure of any access on any rank is told on all ranks, and a whole checkpoint is left") {
  temporary_folder folder;
  const ck::save_plan plan = model_plan(2, 2);
  save_model(folder.str(), {2, 2}, 1, 1);
  int failures = 0;
  for (int failing = 0; failing < 2; ++failing) {
    for (const bool in_background : {false, true}) {
      for (int nth = 0;; ++nth) {
        CAPTURE(failing);
        CAPTURE(nth);
        std::vector<std::string> texts(2);
        int accesses = 0;
        ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
          const model_rank model(comm.rank(), 2, 2, 2);
          ck::save_options options{.directory = folder.str(), .keep_last = 1};
          if (comm.rank() == failing) {
            options.observer = [&](const ck::io_event&) {
              if (accesses++ == nth) throw std::runtime_error("the disk is full");
            };
          }
          ck::saver saver(comm, options);
          texts[static_cast<std::size_t>(comm.rank())] = message_of<ts::checkpoint_error>([&] {
            if (in_background) {
              saver.save_async(plan, model.sources(), {.step = 2});
              saver.wait();
            } else {
              saver.save(plan, model.sources(), {.step = 2});
            }
          });
        });
        CHECK(texts[0] == texts[1]);
        const bool failed = !texts[0].empty();
        if (failed) CHECK(contains(texts[0], "rank " + std::to_string(failing) + ": the disk is full"));
        failures += failed ? 1 : 0;
        // what is loaded is one of the two, whole
        const auto found = ck::find_checkpoint(folder.str());
        REQUIRE(found);
        const std::uint64_t version = *found == folder / "step-2" ? 2 : 1;
        if (!failed) CHECK(version == 2);
        ts::comm::threads::run(3, [&](ts::comm::threads& comm) {
          model_rank model(comm.rank(), 3, 1, 0);
          ck::load(comm, *found, model.targets());
          if (model.differences(version) != 0) throw std::runtime_error("half a checkpoint");
        });
        fs::remove_all(folder / "step-2");
        fs::remove(folder / "latest");
        if (!fs::exists(folder / "step-1")) save_model(folder.str(), {2, 2}, 1, 1);
        if (accesses <= nth) break;  // there was no such access any more
      }
    }
  }
  CHECK(failures > 30);
  save_model(folder.str(), {2, 2}, 3, 3);
  for (const auto& entry : fs::directory_iterator(folder.str())) {
    CHECK_FALSE(contains(entry.path().filename().string(), ".tmp-"));
  }
}

TEST_CASE("what a rank finds wrong after a save has begun is told on all, and the folder goes") {
  temporary_folder folder;
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    const model_rank model(comm.rank(), 2, 1, 1);
    std::vector<ck::source_piece> pieces = model.sources();
    const auto lose = [&](const ck::io_event& e) {
      if (e.kind == ck::io_kind::create_directory) pieces[0].data = nullptr;  // rank 0 alone makes it
    };
    ck::saver saver(comm, {.directory = folder.str(), .observer = lose});
    const auto save = [&] { saver.save(model_plan(2, 1), pieces, {.step = 1}); };
    if (const std::string text = message_of<ts::checkpoint_error>(save);
        !contains(text, "rank 0: tensor 'experts.up' has no data"))
      throw std::runtime_error(text);
    saver.save(model_plan(2, 1), model.sources(), {.step = 2});  // the communicator is usable
  });
  CHECK(ck::list_steps(folder.str()) == std::vector<std::int64_t>{2});
  for (const auto& entry : fs::directory_iterator(folder.str()))
    CHECK_FALSE(contains(entry.path().filename().string(), ".tmp-"));
}

TEST_CASE("ranks that disagree about the plan or the step are told so") {
  temporary_folder folder;
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    const model_rank model(comm.rank(), 2, 1, 1);
    ck::saver saver(comm, {.directory = folder.str()});
    const ck::save_plan plan = ck::make_plan(2, [&](int rank) { return model_pieces(rank, 2, 1); },
                                             {.split_bytes = 1000 + comm.rank() * 5000});
    const std::string other_plan =
        message_of<ts::checkpoint_error>([&] { saver.save(plan, model.sources(), {.step = 1}); });
    const std::string other_step =
        message_of<ts::checkpoint_error>([&] { saver.save(model_plan(2, 1), model.sources(), {.step = comm.rank()}); });
    std::vector<ck::source_piece> pieces = model.sources();
    if (comm.rank() == 1) pieces.resize(3);
    const std::string too_few =
        message_of<ts::checkpoint_error>([&] { saver.save(model_plan(2, 1), pieces, {.step = 1}); });
    if (!contains(other_plan, "different plans") || !contains(other_step, "different steps") ||
        !contains(too_few, "rank 1: the plan lets rank 1 write")) {
      throw std::runtime_error(other_plan + other_step + too_few);
    }
  });
  CHECK(ck::list_steps(folder.str()).empty());
}

TEST_CASE("what one rank finds wrong in a checkpoint is told on all, and no memory has changed") {
  temporary_folder folder;
  save_model(folder.str(), {4, 2}, 1, 1);
  const std::string path = folder / "step-1";
  const std::string file = path + "/rank-00002.safetensors";
  std::string bytes = read_file(file);
  bytes[bytes.size() - 100] = static_cast<char>(bytes[bytes.size() - 100] ^ 4);
  write_file(file, bytes);
  std::vector<std::string> texts(3);
  std::atomic<int> changed{0};
  ts::comm::threads::run(3, [&](ts::comm::threads& comm) {
    model_rank model(comm.rank(), 3, 3, 0);
    texts[static_cast<std::size_t>(comm.rank())] =
        message_of<ts::checkpoint_error>([&] { ck::load(comm, path, model.targets()); });
    if (!model.is_untouched()) ++changed;
  });
  CHECK(contains(texts[0], "rank-00002.safetensors: the checksum of"));
  CHECK(contains(texts[0], "of tensor '"));
  CHECK(texts[1] == texts[0]);
  CHECK(texts[2] == texts[0]);
  CHECK(changed == 0);
}

}  // namespace
