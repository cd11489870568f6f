// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tessera/comm/self.hpp>
#include <tessera/comm/threads.hpp>
#include <tessera/layout/layout.hpp>
#include <tessera/shard/shard.hpp>

#include "../support/comm_checks.hpp"
#include "../support/messages.hpp"

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;
using comm_checks::require;
using tessera_test::contains;
using tessera_test::message_of;

template <class P, class M, class R, class Comm>
struct owned {
  std::vector<sh::group_shape> shapes;
  sh::memory_sizes sizes;
  ts::host_buffer state, step;
  sh::fully_sharded<P, M, R, Comm> model;

  static std::vector<sh::group_shape> shapes_of(const std::vector<sh::group<Comm>>& groups) {
    std::vector<sh::group_shape> shapes;
    for (const auto& g : groups) shapes.push_back(sh::shape_of(g));
    return shapes;
  }
  explicit owned(const std::vector<sh::group<Comm>>& groups, const sh::options& choices = {}, int paint = 0)
      : shapes(shapes_of(groups)),
        sizes(sh::memory_of<P, M, R>(shapes, choices)),
        state(sizes.state()),
        step((std::memset(state.data(), paint, sizes.state()), sizes.step())),
        model((std::memset(step.data(), paint, sizes.step()), groups), choices, ts::state_memory(state),
              sh::step_memory(step)) {}
};

std::vector<sh::parameter> odd_parameters() {
  return {{.name = "a", .whole = ts::box::whole({6, 5})},
          {.name = "b", .whole = ts::box::whole({3, 12}), .dim = 1, .decays = false},
          {.name = "c", .whole = ts::box::whole({1})},
          {.name = "d", .whole = ts::box::whole({7, 2, 2})}};
}

// A small integer, so that sums are exact in any order.
double value(int group, int i, std::int64_t k, int contribution = 0) {
  return static_cast<double>((13 * group + 7 * i + 3 * k + 5 * contribution) % 31 - 15);
}

template <class P, class R>
void gather_and_reduce(ts::comm::threads& comm, std::int64_t chunks, bool background) {
  using A = typename P::accumulate;
  ts::comm::threads gather = comm.split(0, comm.rank());
  std::vector<sh::group<ts::comm::threads>> groups;
  for (int g = 0; g < 3; ++g) {
    groups.push_back({.name = "group " + std::to_string(g),
                      .parameters = g == 1 ? std::vector<sh::parameter>{} : odd_parameters(),
                      .ranks = &comm,
                      .gather = background ? &gather : nullptr,
                      .chunks = chunks,
                      .max_chunks = 3});
  }
  owned<P, A, R, ts::comm::threads> all(groups);
  auto& model = all.model;
  for (const int g : {0, 2}) {
    for (int i = 0; i < 4; ++i) {
      std::vector<A> whole;
      for (std::int64_t k = 0; k < model.layout(g).elements(i); ++k) whole.push_back(static_cast<A>(value(g, i, k)));
      model.set(g, i, whole);
    }
  }
  model.forward([&](int g) {
    for (int i = 0; i < model.layout(g).num_parameters(); ++i) {
      for (std::int64_t k = 0; k < model.layout(g).elements(i); ++k) {
        require(static_cast<double>(model.full(g, i)[static_cast<std::size_t>(k)]) == value(g, i, k), "group ", g,
                " parameter ", i, " element ", k);
      }
    }
  });
  model.backward([&](int g) {
    for (int i = 0; i < model.layout(g).num_parameters(); ++i) {
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const auto whole = model.full_gradient(g, i, chunk);
        require(reinterpret_cast<std::uintptr_t>(whole.data()) % ts::memory_alignment == 0, "not aligned");
        for (std::size_t k = 0; k < whole.size(); ++k) {
          whole[k] = sh::detail::to_element<typename P::gradient>(
              value(g, i, static_cast<std::int64_t>(k), static_cast<int>(3 * comm.rank() + chunk)));
        }
      }
    }
  });
  // brute force: all ranks' contributions of the elements in this rank's part
  for (const int g : {0, 2}) {
    for (int i = 0; i < 4; ++i) {
      const ts::box part = model.layout(g).part(i, comm.rank()), shape = model.layout(g).at(i).whole;
      const auto local = model.local(g, i);
      require(local.count == part.volume(), "count");
      for (std::int64_t k = 0; k < shape.volume(); ++k) {
        std::int64_t index[ts::max_box_rank] = {};
        std::int64_t left = k;
        for (int d = shape.rank - 1; d >= 0; --d) {
          index[d] = left % shape.size[d];
          left /= shape.size[d];
        }
        if (!part.contains(index)) continue;
        double sum = 0;
        for (int rank = 0; rank < comm.size(); ++rank) {
          for (int chunk = 0; chunk < chunks; ++chunk) sum += value(g, i, k, 3 * rank + chunk);
        }
        const auto place = static_cast<std::size_t>(part.local_offset(index));
        require(static_cast<double>(local.gradient[place]) == sum, "gradient of group ", g, " parameter ", i,
                " element ", k, ": ", static_cast<double>(local.gradient[place]), ", expected ", sum);
        require(static_cast<double>(local.master[place]) == value(g, i, k), "master");
      }
    }
  }
}

TEST_CASE("gathers and reductions of odd shapes are what brute force gives, for 1 to 4 ranks") {
  for (int ranks = 1; ranks <= 4; ++ranks) {
    ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
      gather_and_reduce<ts::precision::fp64, ts::reduction::native>(comm, 1, false);
      gather_and_reduce<ts::precision::bf16_gradients, ts::reduction::native>(comm, 2, true);
      gather_and_reduce<ts::precision::bf16, ts::reduction::ordered>(comm, 3, true);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------

std::int64_t up(std::int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Three layers of one weight each, 10 x 16, 7 x 16 and 9 x 16, and a last one, 5 x 16, that stays gathered.
constexpr std::int64_t layer_rows[] = {10, 7, 9, 5};

template <class Comm>
std::vector<sh::group<Comm>> weights(Comm* ranks, Comm* replicas = nullptr) {
  std::vector<sh::group<Comm>> groups;
  for (int g = 0; g < 4; ++g) {
    groups.push_back({.name = "layer " + std::to_string(g),
                      .parameters = {{.name = "w" + std::to_string(g), .whole = ts::box::whole({layer_rows[g], 16})}},
                      .ranks = ranks,
                      .replicas = replicas,
                      .reshard_after_forward = g < 3});
  }
  return groups;
}

template <class Model>
void one_step(Model& model, int number) {
  model.forward([](int) {});
  model.backward([&](int g) {
    for (auto& x : model.full_gradient(g, 0)) x = 0.5F;
  });
  model.divide_gradients(2);
  static_cast<void>(model.gradient_norm());
  model.step({}, number, 1e-3);
}

TEST_CASE("peak memory is the formula, and a step writes just those bytes") {
  for (const int prefetch : {0, 1, 2, 7, std::numeric_limits<int>::max()}) {
    for (int ranks = 1; ranks <= 4; ++ranks) {
      CAPTURE(prefetch);
      CAPTURE(ranks);
      // what the documentation says, in plain numbers: bf16 parameters, fp32 masters and gradients, bf16 moments
      std::int64_t state = 0, gathered = up(2 * 16 * 5), gradients = 0, largest = 10, row = 0;
      std::vector<std::int64_t> slots(static_cast<std::size_t>(std::min(2, prefetch) + 1), 0);
      for (std::size_t g = 0; g < 4; ++g) {
        const std::int64_t part = (layer_rows[g] + ranks - 1) / ranks * 16;  // of rank 0
        state += up(2 * part) + up(4 * part) + 2 * up(2 * part);
        gradients += up(4 * part);
        row = std::max(row, part);
        if (g < 3) slots[g % slots.size()] = std::max(slots[g % slots.size()], 2 * 16 * layer_rows[g]);
      }
      for (const std::int64_t slot : slots) gathered += up(slot);
      const std::int64_t expected_step = gathered + up(2 * ranks * row) + up(4 * 16 * largest) + up(4 * 16 * 5) +
                                         gradients + up(4 * ranks * row) + 2 * up(4 * row) +
                                         4 * static_cast<std::int64_t>(sizeof(sh::exact_sum));
      // written bytes: those that differ from the paint, in either of two colours
      std::vector<bool> written;
      sh::memory_sizes sizes;
      std::mutex mutex;
      for (const int paint : {0xa5, 0x5a}) {
        ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
          owned<ts::precision::bf16, ts::bfloat16, ts::reduction::native, ts::comm::threads> all(
              weights(&comm), {.prefetch = prefetch}, paint);
          for (int g = 0; g < 4; ++g) {
            all.model.set(g, 0, std::vector<float>(static_cast<std::size_t>(16 * layer_rows[g]), 0.25F));
            const auto local = all.model.local(g, 0);
            std::fill_n(local.exp_avg, local.count, ts::bfloat16(0.0F));
            std::fill_n(local.exp_avg_sq, local.count, ts::bfloat16(0.0F));
          }
          one_step(all.model, 1);
          const std::lock_guard lock(mutex);
          if (comm.rank() != 0) return;
          sizes = all.sizes;
          written.resize(all.step.size());
          for (std::size_t b = 0; b < all.step.size(); ++b) {
            if (all.step.data()[b] != static_cast<std::byte>(paint)) written[b] = true;
          }
        });
      }
      std::int64_t high_water = 0, unused = 0, run = 0;
      for (std::size_t b = 0; b < written.size(); ++b) {
        run = written[b] ? 0 : run + 1;
        if (written[b]) high_water = static_cast<std::int64_t>(b) + 1;
        if (run == 256) ++unused;  // more than a gap for alignment
      }
      CHECK(up(static_cast<std::int64_t>(sizes.state())) == state);
      CHECK(static_cast<std::int64_t>(sizes.gathered) + 255 >= gathered);
      CHECK(static_cast<std::int64_t>(sizes.gathered) <= gathered);
      CHECK(static_cast<std::int64_t>(sizes.step()) == expected_step);
      CHECK(high_water == expected_step);
      CHECK(unused == 0);
    }
  }
}

TEST_CASE("groups that are gathered together do not share memory, and the peak is reached") {
  ts::comm::self<ts::space::host> self;
  owned<ts::precision::fp32, float, ts::reduction::native, ts::comm::self<ts::space::host>> all(weights(&self),
                                                                                                {.prefetch = 1});
  auto& model = all.model;
  for (int g = 0; g < 4; ++g) {
    model.set(g, 0, std::vector<float>(static_cast<std::size_t>(16 * layer_rows[g]), static_cast<float>(g)));
  }
  std::size_t most = 0;
  const auto look = [&](int) {
    std::size_t bytes = 0;
    for (int g = 0; g < 4; ++g) {
      std::span<float> whole;
      try {
        whole = model.full(g, 0);
      } catch (const ts::invalid_argument&) {
        continue;
      }
      for (const float x : whole) REQUIRE(x == static_cast<float>(g));
      bytes += whole.size_bytes();
    }
    most = std::max(most, bytes);
  };
  model.forward(look);
  model.begin_gather(2);
  look(0);  // the one that stays, and two more
  model.begin_gather(1);
  look(0);
  model.release(1);
  model.release(2);
  CHECK(most == 4 * 16 * (5 + 9 + 7));
  CHECK(all.sizes.gathered >= most);
  // slots 0 and 1 hold layers 0, 2 and 1: the largest of each, and what stays
  CHECK(all.sizes.gathered <= up(4 * 16 * 10) + up(4 * 16 * 7) + up(4 * 16 * 5));
}

TEST_CASE("memory that is too small or not aligned is refused") {
  ts::comm::self<ts::space::host> self;
  using model = sh::fully_sharded<ts::precision::fp32, float, ts::reduction::native, ts::comm::self<ts::space::host>>;
  const auto groups = weights(&self);
  std::vector<sh::group_shape> shapes;
  for (const auto& g : groups) shapes.push_back(sh::shape_of(g));
  const auto sizes = sh::memory_of<ts::precision::fp32, float, ts::reduction::native>(shapes, {});
  ts::host_buffer state(sizes.state()), step(sizes.step());
  const ts::state_memory good_state(state);
  const sh::step_memory good_step(step);
  CHECK_NOTHROW(model(groups, {}, good_state, good_step));
  CHECK_THROWS_AS(model(groups, {}, ts::state_memory(state.data(), sizes.state() - 1), good_step),
                  ts::invalid_argument);
  CHECK_THROWS_AS(model(groups, {}, good_state, sh::step_memory(step.data(), sizes.step() - 1)), ts::invalid_argument);
  CHECK_THROWS_AS(model(groups, {}, ts::state_memory(state.data() + 8, sizes.state()), good_step),
                  ts::invalid_argument);
  CHECK_THROWS_AS(model(groups, {.prefetch = -1}, good_state, good_step), ts::invalid_argument);
  auto wrong = groups;
  wrong[1].gather = &self;
  CHECK_THROWS_AS(model(wrong, {}, good_state, good_step), ts::invalid_argument);
  wrong = groups;
  wrong[2].chunks = 2;
  CHECK_THROWS_AS(model(wrong, {}, good_state, good_step), ts::invalid_argument);
  wrong = groups;
  wrong[3].ranks = nullptr;
  CHECK_THROWS_AS(sh::shape_of(wrong[3]), ts::invalid_argument);
}

TEST_CASE("calls out of order are refused with the group's name") {
  ts::comm::self<ts::space::host> self;
  owned<ts::precision::fp32, float, ts::reduction::native, ts::comm::self<ts::space::host>> all(weights(&self),
                                                                                                {.prefetch = 0});
  auto& model = all.model;
  CHECK(contains(message_of([&] { model.full(1, 0); }), "'w1' is not whole"));
  CHECK(contains(message_of([&] { model.end_gather(1); }), "'layer 1' without begin_gather"));
  CHECK(contains(message_of([&] { model.release(1); }), "'layer 1', which is not gathered"));
  model.begin_gather(0);
  CHECK(contains(message_of([&] { model.begin_gather(1); }), "the memory of group 'layer 0'"));
  CHECK(contains(message_of([&] { model.set(0, 0, std::vector<float>(160)); }), "while group 'layer 0' is gathered"));
  CHECK(contains(message_of([&] { model.set(1, 0, std::vector<float>(160)); }), "has 112 elements, 160"));
  CHECK(contains(message_of([&] { model.reduce(0); }), "nobody has written"));
  model.full_gradient(0, 0)[0] = 1.0F;
  CHECK(contains(message_of([&] { model.full_gradient(1, 0); }), "those of group 'layer 0'"));
  CHECK(contains(message_of([&] { model.full_gradient(3, 0, 1); }), "no chunk 1"));
  CHECK(contains(message_of([&] { model.step({}, 1, 1e-3); }), "not reduced"));
  model.reduce(0);
  CHECK(contains(message_of([&] { model.step({}, 1, 1e-3); }), "'layer 1' has no gradients"));
  CHECK(contains(message_of([&] { model.set_requires_gradient_sync(false); }), "accumulate_unsharded"));
  CHECK(contains(message_of([&] { model.full(4, 0); }), "no shard group 4"));
  CHECK(contains(message_of([&] { model.full(0, 1); }), "no parameter 1"));
  for (const int g : {1, 2, 3}) {
    for (auto& x : model.full_gradient(g, 0)) x = 0;
    model.reduce(g);
  }
  CHECK(contains(message_of([&] { model.step({}, 1, 1e-3); }), "'layer 0' is gathered"));
  for (const double divisor : {0.0, -1.0, 1e-300, 1e-39, 1e39, std::nan(""), HUGE_VAL}) {
    CAPTURE(divisor);
    CHECK(contains(message_of([&] { model.divide_gradients(divisor); }), "it must be between 1.17549e-38 and 3.40282"));
  }
  model.abandon_step();
  CHECK(contains(message_of([&] { model.gradient_norm(); }), "no gradients"));
  one_step(model, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Dense parameters over all ranks, experts over ep and efsdp, with replicas: 2 replicas x (efsdp 2 x ep 2).

constexpr int num_experts = 6;

struct mixed_result {
  double norm = 0;
  std::vector<double> dense, experts;  // summed gradients, logical
};

// The dense gradient has contributions from every rank, an expert's from the ranks that hold it. With stages, groups
// come from a training mesh, and only the first stage has experts.
mixed_result mixed(int replicas, int efsdp, int ep, bool finite, std::string* message, int stages = 0) {
  mixed_result result;
  result.dense.resize(7 * 3);
  result.experts.resize(num_experts * 4);
  std::mutex mutex;
  ts::comm::threads::run(std::max(stages, 1) * replicas * efsdp * ep, [&](ts::comm::threads& world) {
    const int inner = efsdp * ep, stage_size = replicas * inner;
    const int stage = world.rank() / stage_size, replica = world.rank() % stage_size / inner;
    const int place = world.rank() % inner;
    using comm_type = ts::comm::threads;
    comm_type dense = world.split(stage * replicas + replica, world.rank());
    comm_type same = world.split(stage * inner + place, world.rank());  // replicas of the same parts
    comm_type ep_ranks = world.split(world.rank() / ep, world.rank());
    comm_type efsdp_ranks = world.split((stage * replicas + replica) * ep + place % ep, world.rank());
    const ts::layout::round_robin placement(num_experts, ep);
    const std::vector<sh::parameter> gate{{.name = "gate", .whole = ts::box::whole({7, 3})}};
    const std::vector<sh::parameter> expert_weights{
        sh::expert_parameter("experts.w", placement, ep_ranks.rank(), ts::box::whole({num_experts, 4}))};
    std::vector<sh::group<comm_type>> groups{{.name = "dense", .parameters = gate, .ranks = &dense, .replicas = &same},
                                             {.name = "experts",
                                              .parameters = expert_weights,
                                              .ranks = &efsdp_ranks,
                                              .replicas = &same,
                                              .distinct = {&ep_ranks}}};
    std::unique_ptr<sh::mesh_groups<comm_type>> on_mesh;
    if (stages > 0) {
      const ts::training_mesh mesh({.pp = stages, .dp_replicate = replicas, .dp_shard = inner, .ep = ep}, world.size());
      on_mesh = std::make_unique<sh::mesh_groups<comm_type>>(world, mesh, true);
      groups = {on_mesh->dense("dense", gate)};
      if (stage == 0) groups.push_back(on_mesh->experts("experts", expert_weights));
      require(on_mesh->expert_ranks().rank() == ep_ranks.rank() && on_mesh->dense_ranks().rank() == dense.rank() &&
                  on_mesh->replicas().rank() == same.rank(),
              "the mesh has other ranks");
    }
    owned<ts::precision::fp32, float, ts::reduction::ordered, comm_type> all(groups);
    auto& model = all.model;
    model.backward([&](int g) {
      const auto whole = model.full_gradient(g, 0);
      for (std::size_t k = 0; k < whole.size(); ++k) {
        if (g == 0) {  // whatever the ranks, the sum is the same
          whole[k] = replica + place == 0 ? static_cast<float>(0.1 * static_cast<double>(k) - 0.7) : 0.0F;
        } else {
          const int expert = placement.expert_at(ep_ranks.rank(), static_cast<int>(k / 4));
          const bool first = replica == 0 && efsdp_ranks.rank() == 0;
          whole[k] = first ? static_cast<float>(0.3 * (4 * expert + static_cast<int>(k % 4)) - 2) : 0.0F;
          if (!finite && expert == 4 && k % 4 == 1 && first) whole[k] = std::numeric_limits<float>::infinity();
        }
      }
    });
    model.divide_gradients(8);  // the same for both
    double norm = 0;
    try {
      norm = model.gradient_norm(on_mesh ? on_mesh->stages() : nullptr);
    } catch (const ts::error& e) {
      const std::lock_guard lock(mutex);
      require(message != nullptr, e.what());
      std::string& mine = message[stage];
      require(mine.empty() || mine == e.what(), "ranks disagree: ", e.what());
      mine = e.what();
      return;
    }
    const std::lock_guard lock(mutex);
    require(result.norm == 0 || result.norm == norm, "ranks have different norms");
    result.norm = norm;
    if (replica > 0) return;
    for (int g = 0; g < model.num_groups(); ++g) {  // by the logical boxes, as a checkpoint would
      const auto local = model.local(g, 0);
      for (const ts::held_box& held :
           model.layout(g).logical_part(0, groups[static_cast<std::size_t>(g)].ranks->rank())) {
        const std::int64_t width = held.logical.size[1];
        auto& into = g == 0 ? result.dense : result.experts;
        for (std::int64_t k = 0; k < held.local.volume(); ++k) {
          into[static_cast<std::size_t>(held.logical.offset[0] * width + k)] =
              static_cast<double>(local.gradient[held.local.offset[0] * width + k]);
        }
      }
    }
  });
  return result;
}

TEST_CASE("the gradient norm counts each parameter once, with the same bits on every mesh") {
  double squares = 0;
  for (int k = 0; k < 21; ++k) squares += std::pow(static_cast<double>(static_cast<float>(0.1 * k - 0.7)) / 8, 2);
  for (int k = 0; k < 24; ++k) squares += std::pow(static_cast<double>(static_cast<float>(0.3 * k - 2)) / 8, 2);
  const mixed_result one = mixed(1, 1, 1, true, nullptr);
  CHECK(one.norm == doctest::Approx(std::sqrt(squares)).epsilon(1e-14));
  struct split {
    int replicas, efsdp, ep;
  };
  for (const split s :
       {split{1, 2, 1}, split{1, 1, 3}, split{2, 1, 1}, split{1, 2, 2}, split{2, 2, 2}, split{2, 2, 3}}) {
    CAPTURE(s.replicas);
    CAPTURE(s.efsdp);
    CAPTURE(s.ep);
    const mixed_result r = mixed(s.replicas, s.efsdp, s.ep, true, nullptr);
    CHECK(r.norm == one.norm);
    CHECK(r.dense == one.dense);
    CHECK(r.experts == one.experts);
    const mixed_result on_mesh = mixed(s.replicas, s.efsdp, s.ep, true, nullptr, 1);
    CHECK(on_mesh.norm == one.norm);
    CHECK(on_mesh.experts == one.experts);
  }
  for (int k = 0; k < 21; ++k) squares += std::pow(static_cast<double>(static_cast<float>(0.1 * k - 0.7)) / 8, 2);
  CHECK(mixed(1, 2, 1, true, nullptr, 2).norm == doctest::Approx(std::sqrt(squares)).epsilon(1e-14));
}

TEST_CASE("a gradient that is not finite is reported on every rank, with its group") {
  std::string message[2];
  mixed(2, 2, 2, false, message);
  CHECK(message[0] == "gradients are not finite: group 'experts' (1 elements)");
  message[0].clear();
  mixed(1, 2, 2, false, message, 2);
  CHECK(message[0] == "gradients are not finite: group 'experts' (1 elements)");
  CHECK(message[1] == "gradients are not finite: in another pipeline stage (1 elements)");
}

TEST_CASE("the state's arrays cover each logical tensor once per replica, with names for checkpoints") {
  std::mutex mutex;
  std::map<std::string, std::map<std::int64_t, int>> covered;  // name -> element -> times, replica 0
  std::map<int, int> replicas;
  ts::comm::threads::run(6, [&](ts::comm::threads& world) {
    ts::comm::threads ranks = world.split(world.rank() / 3, world.rank());
    ts::comm::threads same = world.split(world.rank() % 3, world.rank());
    std::vector<sh::group<ts::comm::threads>> groups{
        {.name = "g", .parameters = odd_parameters(), .ranks = &ranks, .replicas = &same}};
    owned<ts::precision::bf16, float, ts::reduction::native, ts::comm::threads> all(groups);
    const std::lock_guard lock(mutex);
    for (const sh::state_array& array : all.model.state_arrays(0)) {
      require(array.num_replicas == 2, "replicas");
      ++replicas[array.replica];
      const bool parameter = array.name.find('.') == std::string::npos;
      require(array.dtype == (parameter ? "BF16" : "F32"), array.name, " is ", array.dtype);
      for (const ts::held_box& held : array.parts) {
        require(array.data != nullptr, "no data");
        for (std::int64_t r = 0; array.replica == 0 && r < held.logical.volume(); ++r) {
          std::int64_t index[ts::max_box_rank] = {};
          std::int64_t left = r;
          for (int d = held.logical.rank - 1; d >= 0; --d) {
            index[d] = held.logical.offset[d] + left % held.logical.size[d];
            left /= held.logical.size[d];
          }
          ++covered[array.name][array.whole.local_offset(index)];
        }
      }
    }
  });
  CHECK(replicas == std::map<int, int>{{0, 3 * 16}, {1, 3 * 16}});
  CHECK(covered.size() == 16);
  for (const auto& p : odd_parameters()) {
    for (const char* suffix : {"", ".master", ".exp_avg", ".exp_avg_sq"}) {
      const auto& elements = covered[p.name + suffix];
      CHECK(static_cast<std::int64_t>(elements.size()) == p.whole.volume());
      for (const auto& [element, times] : elements) CHECK(times == 1);
    }
  }
}

TEST_CASE("groups of a mesh with tensor parallelism are refused") {
  ts::comm::threads::run(2, [](ts::comm::threads& world) {
    const ts::training_mesh mesh({.tp = 2}, 2);
    comm_checks::caught<ts::invalid_argument>([&] { sh::mesh_groups<ts::comm::threads>(world, mesh, false); });
  });
}

TEST_CASE("masters can be made from parameters") {
  ts::comm::self<ts::space::host> self;
  owned<ts::precision::bf16, float, ts::reduction::native, ts::comm::self<ts::space::host>> all(weights(&self));
  const auto local = all.model.local(1, 0);
  for (std::int64_t k = 0; k < local.count; ++k) local.parameter[k] = ts::bfloat16(static_cast<float>(k));
  all.model.masters_from_parameters();
  for (std::int64_t k = 0; k < local.count; ++k) CHECK(local.master[k] == static_cast<float>(k));
}

// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("a rank that fails while gathers are under way ends the others at once, and its error is the one reported") {
  for (const bool background : {false, true}) {
    for (const int where : {0, 1, 2}) {
      CAPTURE(background);
      CAPTURE(where);
      const auto begin = std::chrono::steady_clock::now();
      std::string text;
      try {
        ts::comm::threads::run(3, [&](ts::comm::threads& comm) {
          ts::comm::threads gather = comm.split(0, comm.rank());
          auto groups = weights(&comm);
          for (auto& g : groups) g.gather = background ? &gather : nullptr;
          owned<ts::precision::fp32, float, ts::reduction::native, ts::comm::threads> all(groups);
          const auto check = [&](int g, int stage) {
            if (comm.rank() == 1 && g == 1 && where == stage) throw std::runtime_error("out of coffee");
          };
          all.model.forward([&](int g) { check(g, 0); });
          all.model.backward([&](int g) {
            check(g, 1);
            for (auto& x : all.model.full_gradient(g, 0)) x = 1;
          });
          check(1, 2);
          static_cast<void>(all.model.gradient_norm());
        });
      } catch (const std::exception& e) {
        text = e.what();
      }
      CHECK(text == "out of coffee");
      CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(5));
    }
  }
}

TEST_CASE("after a failure that every rank survives, the step is abandoned and the next one works") {
  std::atomic<int> expecting{0};  // ranks that are where the failure is caught
  ts::comm::threads::run(3, [&](ts::comm::threads& comm) {
    ts::comm::threads gather = comm.split(0, comm.rank());
    auto groups = weights(&comm);
    for (auto& g : groups) g.gather = &gather;
    owned<ts::precision::fp32, float, ts::reduction::ordered, ts::comm::threads> all(groups);
    for (int round = 0; round < 2; ++round) {
      if (comm.rank() == 2) {
        while (expecting.load() < 2 * (round + 1)) std::this_thread::yield();
        all.model.begin_gather(0);
        comm.fail("a test");
      } else {
        comm_checks::caught<ts::comm_error>([&] {
          ++expecting;
          while (true) all.model.forward([](int) {});
        });
      }
      all.model.abandon_step();
      comm.reset();
      one_step(all.model, round + 1);
    }
  });
}

}  // namespace
