// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include <tessera/comm/load_kernels.cuh>
#include <tessera/comm/self.cuh>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/dispatch/host_sized.cuh>
#include <tessera/dispatch/symmetric.cuh>
#include <tessera/dispatch/transport.cuh>
#include <tessera/moe/detail/device/state_kernels.cuh>
#include <tessera/moe/detail/layer_device.hpp>
#include <tessera/moe/detail/layer_memory.hpp>
#include <tessera/moe/side_stream.hpp>
#include <tessera/router/router.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// What a device layer does with its communicator: alone, between GPUs that write into each other's memory, or wherever
// the communicator reaches, sized on the host.
enum class exchange_kind { alone, peers, host_sized };

template <class Layer>
inline constexpr bool layer_is_alone = std::is_same_v<typename Layer::communicator_type, comm::self<space::device>>;

template <class Layer>
constexpr exchange_kind layer_exchange_kind() {
  if (layer_is_alone<Layer>) return exchange_kind::alone;
  return peer_communicator<typename Layer::communicator_type> ? exchange_kind::peers : exchange_kind::host_sized;
}

template <class Layer>
void layer_load_kernels() {
  static_cast<void>(load_kernels());
}

// What a layer between GPUs refuses before anything is enqueued that other ranks would wait for.
template <class Layer, class... Rows>
void check_exchange(const Layer& layer, std::initializer_list<const std::byte*> memories, const Rows&... rows) {
  if constexpr (layer_exchange_kind<Layer>() == exchange_kind::peers) {
    if (layer.get_options().dispatch.host_sized) return;
    for (const std::byte* memory : memories) {
      TESSERA_EXPECTS(
          memory == nullptr || layer.comm().contains(memory),
          "moe_layer: saved, deferred and workspace memory between GPUs is memory of the communicator: take "
          "it from comm::symmetric::allocate");
    }
    (symmetric::expect_bulk_rows(rows, "moe_layer: tokens and gradients between GPUs"), ...);
    const int streams = copy_streams_of(layer.get_options().transport);
    TESSERA_EXPECTS(layer.comm().copy_streams() >= streams,
                    "moe_layer: the transport needs symmetric_options::copy_streams = "
                        << streams << " or more, the communicator has " << layer.comm().copy_streams());
  }
}

// A handle of the communicator whose operations take `sms` multiprocessors, where it has a say; 0: as they are.
template <class Comm>
Comm within(const Comm& comm, int sms) {
  Comm result = comm;
  if constexpr (requires { result.set_num_sms(sms); }) {
    if (sms > 0) result.set_num_sms(sms);
  }
  return result;
}

// Multiprocessors of rows that travel beside products: so many fill the links.
inline constexpr int sms_beside_products = 16;

// Work beside the caller's stream. Between GPUs it is on the communicator's side stream, where lists are made; on one
// GPU, and sized on the host, on the stream that the engine lends, or on the caller's.
template <class Layer>
class layer_side {
 public:
  using comm_type = typename Layer::communicator_type;
  static constexpr bool of_communicator = peer_communicator<comm_type>;

  layer_side(const Layer& layer, comm_type& comm) {
    side_ = layer.get_options().side;
    if constexpr (of_communicator) {
      if (layer.get_options().dispatch.host_sized) return;
      lists_beside_ = true;
      side_ = {comm.side_stream().get(), comm.fork_event(), comm.join_event()};
      beside_rows_ = comm.num_sms() > 0 ? comm.num_sms() : sms_beside_products;
      beside_products_ = device_attribute(cudaDevAttrMultiProcessorCount) - beside_rows_;
    }
  }

  // The side stream, behind what `stream` holds.
  device_stream fork(device_stream stream) {
    if (side_.stream == nullptr) return stream;
    check_cuda(cudaEventRecord(side_.fork, stream.get()), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(side_.stream, side_.fork, 0), "cudaStreamWaitEvent");
    forked_ = true;
    return side_.stream;
  }
  // The same in forward, when routing and rows are on their way: behind the making of lists, so that the blocks that
  // send rows stand already.
  device_stream fork_behind_lists(device_stream stream) {
    if (!lists_beside_) return fork(stream);
    forked_ = true;
    return side_.stream;
  }
  // What follows on `stream` comes behind what is on the side stream.
  void join(device_stream stream) const {
    if (!forked_) return;
    check_cuda(cudaEventRecord(side_.join, side_.stream), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(stream.get(), side_.join, 0), "cudaStreamWaitEvent");
  }

  // Multiprocessors of rows that travel beside products, and of the first of these; 0: as they like.
  int rows_sms() const { return beside_rows_; }
  int product_sms() const { return beside_products_; }

 private:
  side_stream side_;
  bool forked_ = false;
  bool lists_beside_ = false;
  int beside_rows_ = 0;
  int beside_products_ = 0;
};

// What the steps of a layer's call do with its communicator. `Layer` gives types, `plan` the sizes, `comm` the handle
// whose slot and multiprocessors are used, `buffers` what is sized on the host needs; `on` says where operations are
// enqueued.
template <class Layer, exchange_kind Kind = layer_exchange_kind<Layer>()>
class layer_exchange;

// One GPU: experts read tokens where they are.
template <class Layer>
class layer_exchange<Layer, exchange_kind::alone> {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;

  using comm_type = typename Layer::communicator_type;

  layer_exchange(const Layer& layer, const layer_plan<Layer>& plan, const comm_type& comm,
                 const host_sized_buffers& = {})
      : layer_(layer), plan_(plan), comm_(comm) {}

  layer_exchange& on(device_stream stream, int = 0) {
    stream_ = stream;
    return *this;
  }

  // Chooses experts and makes the lists.
  template <class Inputs>
  void route(const Inputs& in, const routing<A>& chosen, bool counting, const layer_saved<Layer>& saved,
             const layer_forward_scratch<Layer>& scratch) {
    const int num_experts = layer_.dims().num_experts;
    const auto& state = layer_.state();
    const balance_counts counts = counting ? balance_counts(saved.counts, num_experts) : balance_counts{};
    const router_workspace sort{state.barrier, scratch.block_counts};
    set_totals(stream_, saved.handle.total, chosen.expert_ids.rows);
    if (plan_.dispatch.has_capacity() || plan_.bounds.max_pairs < plan_.bounds.max_sent_pairs()) {
      choose(in, chosen, counts);
      exchange_routing(stream_, comm_, layer_.placement(), plan_.bounds, plan_.dispatch, chosen, saved.handle, sort,
                       state.status);
    } else {
      const router_lists<A> lists{saved.handle.expert_offsets, saved.handle.gather, saved.handle.expert_row_of,
                                  saved.handle.pair_weights};
      route_sorted(stream_, layer_.get_router(), in, chosen, counts, lists, sort, state.status);
    }
  }
  void send_routing(const routing<A>&, bool, const layer_saved<Layer>&, const layer_forward_window<Layer>&,
                    const layer_forward_scratch<Layer>&) {}
  void await_lists() {}
  void begin_backward(const layer_saved<Layer>&) {}

  // Counts of this rank's pairs.
  static const std::int64_t* own_counts(const layer_saved<Layer>& saved, const layer_forward_scratch<Layer>&) {
    return saved.counts;
  }

  const comm::symmetric_failure* failure() const { return nullptr; }

  // Without lists, which a capacity and a bound change.
  template <class Inputs>
  void choose(const Inputs& in, const routing<A>& chosen, const balance_counts& counts) {
    layer_.get_router().route(stream_, in, chosen, counts, layer_.state().status);
  }

  void send_rows(const layer_saved<Layer>&, matrix_view<const S>, S*) {}
  matrix_view<const S> await_rows(matrix_view<const S> rows, S*) { return rows; }
  matrix_view<const S> arrived(matrix_view<const S> rows, S*) const { return rows; }

  // y = sums of the tokens' expert rows, and `plus`.
  void combine(const layer_saved<Layer>& saved, matrix_view<const A> weights, bool weighted, matrix_view<const S> pairs,
               const returned_rows<S>&, matrix_view<const S> plus, matrix_view<S> y) {
    if (!weighted) weights.data = nullptr;
    combine_rows(stream_, pairs, saved.handle.expert_row_of, weights, plus, y);
  }

  void values_home(const layer_saved<Layer>& saved, const A* values, matrix_view<A> home) {
    return_pair_values(stream_, comm_, saved.handle, values, home, pair_values_workspace<A>{});
  }

 private:
  device_stream stream_ = static_cast<CUstream_st*>(nullptr);
  const Layer& layer_;
  const layer_plan<Layer>& plan_;
  comm_type comm_;
};

// Sized on the host. A pass begins with counts that are read; what follows in it finds them where they were put.
template <class Layer>
class layer_exchange<Layer, exchange_kind::host_sized> {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using comm_type = typename Layer::communicator_type;
  static_assert(host_sized_communicator<comm_type>,
                "moe_layer: the device half needs a communicator that it can dispatch over. Models: "
                "comm::self<space::device>, comm::symmetric, comm::nccl, comm::hosts<comm::nccl>");

  layer_exchange(const Layer& layer, const layer_plan<Layer>& plan, const comm_type& comm,
                 const host_sized_buffers& buffers = {})
      : layer_(layer), plan_(plan), comm_(comm), buffers_(buffers) {}

  layer_exchange& on(device_stream stream, int = 0) {
    stream_ = stream;
    return *this;
  }

  // Chooses experts.
  template <class Inputs>
  void route(const Inputs& in, const routing<A>& chosen, bool counting, const layer_saved<Layer>&,
             const layer_forward_scratch<Layer>& scratch) {
    const int num_experts = layer_.dims().num_experts;
    const balance_counts counts = counting ? balance_counts(scratch.counts, num_experts) : balance_counts{};
    layer_.get_router().route(stream_, in, chosen, counts, layer_.state().status);
  }
  void send_routing(const routing<A>& chosen, bool counting, const layer_saved<Layer>& saved,
                    const layer_forward_window<Layer>& window, const layer_forward_scratch<Layer>& scratch) {
    if (counting && Layer::num_losses > 0) {
      comm_.all_reduce(stream_, static_cast<const std::int64_t*>(scratch.counts), saved.counts,
                       balance_counts::size(layer_.dims().num_experts));
    }
    auto tables = window.gathered;
    tables.sort = {layer_.state().barrier, scratch.block_counts};
    tables.capacity = scratch.capacity;
    static_cast<void>(exchange_routing(stream_, comm_, layer_.placement(), plan_.bounds, plan_.dispatch, chosen,
                                       saved.handle, saved.lists, tables));
  }
  void await_lists() {}
  void begin_backward(const layer_saved<Layer>& saved) { static_cast<void>(read_counts(stream_, comm_, saved.lists)); }

  static const std::int64_t* own_counts(const layer_saved<Layer>&, const layer_forward_scratch<Layer>& scratch) {
    return scratch.counts;
  }
  const comm::symmetric_failure* failure() const { return nullptr; }

  void send_rows(const layer_saved<Layer>& saved, matrix_view<const S> rows, S* received) {
    dispatch_rows(stream_, comm_, counts_of(saved), saved.lists, rows, view(received), buffers_);
  }
  matrix_view<const S> await_rows(matrix_view<const S>, S* received) { return view(received); }
  matrix_view<const S> arrived(matrix_view<const S>, S* received) const { return view(received); }

  void combine(const layer_saved<Layer>& saved, matrix_view<const A> weights, bool weighted, matrix_view<const S> pairs,
               const returned_rows<S>&, matrix_view<const S> plus, matrix_view<S> y) {
    if constexpr (std::is_same_v<typename Layer::combine_type, combine::ordered>) {
      if (!weighted) weights.data = nullptr;
      combine_pairs(stream_, comm_, counts_of(saved), saved.lists, plan_.bounds, pairs, weights, plus, y, buffers_);
    } else {
      combine_rows(stream_, comm_, counts_of(saved), saved.lists, saved.handle,
                   weighted ? combine_weights::routing : combine_weights::none, pairs, plus, y, buffers_);
    }
  }

  void values_home(const layer_saved<Layer>& saved, const A* values, matrix_view<A> home) {
    return_pair_values(stream_, comm_, counts_of(saved), saved.lists, saved.handle, values, home, buffers_);
  }

 private:
  matrix_view<S> view(S* rows) const { return {rows, plan_.bounds.addressed_rows(), layer_.dims().hidden}; }
  host_sized_counts counts_of(const layer_saved<Layer>& saved) { return known_counts(stream_, comm_, saved.lists); }

  device_stream stream_ = static_cast<CUstream_st*>(nullptr);
  const Layer& layer_;
  const layer_plan<Layer>& plan_;
  comm_type comm_;
  host_sized_buffers buffers_;
};

// Several GPUs that reach each other's memory; where the options ask for it, sized on the host all the same.
template <class Layer>
class layer_exchange<Layer, exchange_kind::peers> {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using comm_type = typename Layer::communicator_type;

  layer_exchange(const Layer& layer, const layer_plan<Layer>& plan, const comm_type& comm,
                 const host_sized_buffers& buffers = {})
      : layer_(layer), plan_(plan), comm_(comm), buffers_(buffers), sms_(comm.num_sms()) {}

  // @param sms Multiprocessors of what travels; 0: those of the communicator's handle.
  layer_exchange& on(device_stream stream, int sms = 0) {
    stream_ = stream;
    comm_.set_num_sms(sms > 0 ? sms : sms_);
    return *this;
  }

  // Chooses experts. The lists come with what other ranks send.
  template <class Inputs>
  void route(const Inputs& in, const routing<A>& chosen, bool counting, const layer_saved<Layer>&,
             const layer_forward_scratch<Layer>& scratch) {
    layer_.get_router().route(stream_, in, chosen, counts_of(counting, scratch), layer_.state().status);
  }
  void send_routing(const routing<A>& chosen, bool counting, const layer_saved<Layer>& saved,
                    const layer_forward_window<Layer>& window, const layer_forward_scratch<Layer>& scratch) {
    if (plan_.host_sized()) return by_host().send_routing(chosen, counting, saved, window, scratch);
    exchange_routing_begin(
        stream_, comm_, layer_.placement(), plan_.bounds, plan_.dispatch, chosen, saved.handle,
        symmetric_routing_workspace<A>{window.tables, {layer_.state().barrier, scratch.block_counts}, scratch.capacity},
        counts_of(counting, scratch),
        counting && Layer::num_losses > 0 ? balance_counts(saved.counts, layer_.dims().num_experts) : balance_counts{});
  }
  // Waits for the lists, which experts need.
  void await_lists() {
    if (!plan_.host_sized()) exchange_routing_end(stream_, comm_);
  }
  void begin_backward(const layer_saved<Layer>& saved) {
    if (plan_.host_sized()) by_host().begin_backward(saved);
  }

  static const std::int64_t* own_counts(const layer_saved<Layer>&, const layer_forward_scratch<Layer>& scratch) {
    return scratch.counts;
  }
  // After a failure nothing is counted.
  const comm::symmetric_failure* failure() const {
    return plan_.host_sized() ? nullptr : comm_.view(comm::symmetric_channel::tables).failure;
  }

  void send_rows(const layer_saved<Layer>& saved, matrix_view<const S> rows, S* received) {
    if (plan_.host_sized()) return by_host().send_rows(saved, rows, received);
    dispatch_begin(stream_, comm_, saved.handle, rows, view(received), plan_.transport);
  }
  matrix_view<const S> await_rows(matrix_view<const S> rows, S* received) {
    if (plan_.host_sized()) return by_host().await_rows(rows, received);
    return dispatch_end(stream_, comm_, view(received), plan_.transport);
  }
  matrix_view<const S> arrived(matrix_view<const S>, S* received) const { return view(received); }

  void combine(const layer_saved<Layer>& saved, matrix_view<const A> weights, bool weighted, matrix_view<const S> pairs,
               const returned_rows<S>& returned, matrix_view<const S> plus, matrix_view<S> y) {
    if (plan_.host_sized()) return by_host().combine(saved, weights, weighted, pairs, returned, plus, y);
    if constexpr (std::is_same_v<typename Layer::combine_type, combine::ordered>) {
      if (!weighted) weights.data = nullptr;
      combine_pairs(stream_, comm_, saved.handle, pairs, returned, weights, plus, y);
    } else {
      combine_rows(stream_, comm_, saved.handle, weighted ? combine_weights::routing : combine_weights::none,
                   combine_source::expert_rows, pairs, view(returned.rows), plus, y, plan_.transport,
                   matrix_view<S>{returned.outgoing, plan_.rows_outgoing(), layer_.dims().hidden});
    }
  }

  void values_home(const layer_saved<Layer>& saved, const A* values, matrix_view<A> home) {
    if (plan_.host_sized()) return by_host().values_home(saved, values, home);
    return_pair_values(stream_, comm_, saved.handle, values,
                       matrix_view<A>{home.data, plan_.bounds.max_tokens, home.cols}, pair_values_home::zeroed);
  }
  // Ahead of the combine that `values_home` follows, so that nothing stands between their kernels.
  void clear_values(matrix_view<A> home) {
    if (plan_.host_sized()) return;
    check_cuda(cudaMemsetAsync(home.data, 0, static_cast<std::size_t>(plan_.bounds.max_tokens * home.cols) * sizeof(A),
                               stream_.get()),
               "cudaMemsetAsync");
  }

 private:
  layer_exchange<Layer, exchange_kind::host_sized> by_host() {
    layer_exchange<Layer, exchange_kind::host_sized> exchange(layer_, plan_, comm_, buffers_);
    exchange.on(stream_);
    return exchange;
  }
  matrix_view<S> view(S* rows) const { return {rows, plan_.bounds.addressed_rows(), layer_.dims().hidden}; }
  balance_counts counts_of(bool counting, const layer_forward_scratch<Layer>& scratch) const {
    return counting ? balance_counts(scratch.counts, layer_.dims().num_experts) : balance_counts{};
  }

  device_stream stream_ = static_cast<CUstream_st*>(nullptr);
  const Layer& layer_;
  const layer_plan<Layer>& plan_;
  comm_type comm_;
  host_sized_buffers buffers_;
  int sms_;
};

}  // namespace detail

TESSERA_NAMESPACE_END
