// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The layer over processes gives the bits of the layer over threads. Run under mpirun with any number of processes;
// each process also runs all ranks as threads and compares its own part.

#include <cstdio>
#include <exception>

#include <tessera/comm/mpi.hpp>

#include "../support/layer_fixture.hpp"
#include "../support/routing_cases.hpp"

namespace {

using namespace tessera_test;

template <class Comm, class Combine>
using layer_over =
    ts::moe_layer<ts::router<ts::score::sigmoid, ts::select::top_k, ts::weigh::normalized, ts::balance::switch_loss,
                             ts::balance::bias>,
                  ts::experts<ts::activation::swiglu, ts::precision::bf16>, ts::layout::round_robin, Comm, Combine>;

// What one rank sees of a step.
template <class Layer>
std::vector<double> step(const layer_problem& p, typename Layer::communicator_type& comm) {
  const auto offsets = split_tokens(p.num_tokens, comm.size(), true);
  const auto me = static_cast<std::size_t>(comm.rank());
  layer_rank<Layer> rank(p, ts::layout::round_robin(p.sizes.num_experts, comm.size()), comm, offsets[me],
                         offsets[me + 1] - offsets[me], p.num_tokens, {}, {});
  rank.forward(ts::pass::train);
  rank.backward_input();
  rank.backward_weights();
  rank.layer->end_step({}, comm);
  std::vector<double> seen;
  for (const auto* v : {&rank.y, &rank.dx})
    for (const auto e : *v) seen.push_back(widen(e));
  for (const auto* v : {&rank.up_grad, &rank.down_grad, &rank.gate_grad})
    for (const auto e : *v) seen.push_back(widen(e));
  seen.insert(seen.end(), rank.layer->state().bias, rank.layer->state().bias + p.sizes.num_experts);
  return seen;
}

template <class Combine>
bool same(const layer_problem& p, ts::comm::mpi& comm) {
  const auto processes = step<layer_over<ts::comm::mpi, Combine>>(p, comm);
  std::vector<double> threads;
  ts::comm::threads::run(comm.size(), [&](ts::comm::threads& c) {
    auto seen = step<layer_over<ts::comm::threads, Combine>>(p, c);
    if (c.rank() == comm.rank()) threads = std::move(seen);
  });
  return !threads.empty() && processes == threads;
}

}  // namespace

int main() {
  try {
    const ts::comm::mpi_session session;
    ts::comm::mpi comm(MPI_COMM_WORLD);
    const auto p = make_problem(
        {.num_experts = 10, .top_k = 3, .hidden = 16, .intermediate = 5, .num_shared_experts = 1}, 41, true, 4, true);
    int good = same<ts::combine::ordered>(p, comm) && same<ts::combine::reduced>(p, comm) ? 1 : 0;
    std::vector<int> all(static_cast<std::size_t>(comm.size()));
    comm.all_gather({}, &good, all.data(), 1);
    for (std::size_t r = 0; r < all.size(); ++r)
      if (all[r] == 0) std::fprintf(stderr, "rank %zu: processes and threads differ\n", r);
    return std::find(all.begin(), all.end(), 0) == all.end() ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "layer_mpi_test: %s\n", e.what());
    return 1;
  }
}
