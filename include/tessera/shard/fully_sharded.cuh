// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of ZeRO-3 / FSDP and HSDP: instantiate `fully_sharded` with a communicator of device memory in a `.cu`
/// file that includes this.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/shard/adamw.cuh>
#include <tessera/shard/detail/device/checks.cuh>
#include <tessera/shard/detail/device/move_parts.cuh>
#include <tessera/shard/detail/device/norm.cuh>
#include <tessera/shard/fully_sharded.hpp>
#include <tessera/shard/reduction.cuh>

TESSERA_NAMESPACE_BEGIN
namespace shard {

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
fully_sharded<Precision, Moment, Reduction, Comm>::fully_sharded(std::vector<group<Comm>> groups,
                                                                 const options& choices, state_memory state,
                                                                 step_memory step)
    : base(std::move(groups), choices, state, step) {
  for (int g = 0; g < num_groups(); ++g) {
    const group<Comm>& own = groups_[index(g)];
    const int ranks = own.ranks->size();
    const int replicas = own.replicas == nullptr ? 1 : own.replicas->size();
    const int replica = own.replicas == nullptr ? 0 : own.replicas->rank();
    std::vector<std::int64_t> all = own.chunks_of_ranks;
    if (all.empty()) all.assign(static_cast<std::size_t>(ranks) * static_cast<std::size_t>(replicas), own.chunks);
    TESSERA_EXPECTS(static_cast<std::int64_t>(all.size()) == std::int64_t{ranks} * replicas,
                    "shard group '" << own.name << "': chunks_of_ranks has " << all.size() << " numbers, there are "
                                    << replicas << " replicas of " << ranks << " ranks");
    const auto first = all.begin() + std::ptrdiff_t{replica} * ranks;
    TESSERA_EXPECTS(*(first + own.ranks->rank()) == own.chunks,
                    "shard group '" << own.name << "': chunks_of_ranks says " << *(first + own.ranks->rank())
                                    << " for this rank, which has " << own.chunks << " chunks");
    for (const std::int64_t n : all) {
      TESSERA_EXPECTS(n >= 0 && n <= own.max_chunks, "shard group '" << own.name << "': chunks_of_ranks says " << n
                                                                     << " for a rank, max_chunks = " << own.max_chunks);
    }
    chunks_.emplace_back(first, first + ranks);
    rows_.emplace_back();
    for (int r = 0; r < replicas; ++r) {
      std::int64_t rows = 0;
      for (int s = 0; s < ranks; ++s) {
        rows += all[static_cast<std::size_t>(r) * static_cast<std::size_t>(ranks) + static_cast<std::size_t>(s)];
      }
      rows_.back().push_back(rows);
    }
  }
  write_tables();
  try {
    make_streams();
  } catch (...) {
    free_streams();
    throw;
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
fully_sharded<Precision, Moment, Reduction, Comm>::~fully_sharded() {
  free_streams();
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::make_streams() {
  if (!this->background()) return;
  int lowest = 0;
  int highest = 0;
  detail::check_cuda(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "shard: cudaDeviceGetStreamPriorityRange");
  for (CUstream_st** stream : {&gather_stream_, &reduce_stream_}) {  // few blocks that others wait for: first
    detail::check_cuda(cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, highest),
                       "shard: cudaStreamCreateWithPriority");
  }
  const auto make = [](CUevent_st*& event) {
    detail::check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "shard: cudaEventCreateWithFlags");
  };
  make(forked_);
  make(reduced_);
  gathered_.assign(groups_.size(), nullptr);
  for (CUevent_st*& event : gathered_) make(event);
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::free_streams() noexcept {
  const auto free_event = [](CUevent_st* event) {
    if (event != nullptr) static_cast<void>(cudaEventDestroy(event));
  };
  for (CUevent_st* event : gathered_) free_event(event);
  free_event(forked_);
  free_event(reduced_);
  for (CUstream_st* stream : {gather_stream_, reduce_stream_}) {
    if (stream != nullptr) static_cast<void>(cudaStreamDestroy(stream));
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::write_tables() {
  const auto write = [](const auto& values, auto* to) {
    const std::size_t bytes = values.size() * sizeof(*to);
    if (bytes > 0)
      detail::check_cuda(cudaMemcpy(to, values.data(), bytes, cudaMemcpyHostToDevice), "shard: cudaMemcpy");
  };
  const auto& tables = memory_.tables;
  std::vector<detail::norm_range> tiles(groups_.size());  // of each group
  std::int64_t tile = 0;
  for (int g = 0; g < num_groups(); ++g) {
    const auto& m = memory_.groups[index(g)];
    const auto& t = tables.groups[index(g)];
    write(detail::whole_entries(layout(g)), t.whole);
    write(detail::own_entries(layout(g), groups_[index(g)].ranks->rank()), t.own);
    write(m.parameter, t.parameter);
    write(m.full, t.full);
    write(m.sum, t.sum);
    write(m.contribution, t.contribution);
    tiles[index(g)].first_tile = tile;
    for (int i = 0; i < layout(g).num_parameters(); ++i) tile += detail::tiles_of(local(g, i).count);
    tiles[index(g)].last_tile = tile;
  }
  std::vector<detail::norm_range> ranges;
  for (const int g : norm_order_) ranges.push_back(tiles[index(g)]);
  write(ranges, tables.ranges);
  std::vector<adamw_device_tensor<storage, accumulate, Moment>> described(tensors_.size());
  num_tiles_ = describe_adamw<storage, accumulate, Moment>(std::span<const tensor>(tensors_), described.data());
  write(described, tables.tensors);
  write(std::vector<adamw_control>{{0, 0.0, 1.0, 0}}, tables.control);
  // streams may not wait for it
  detail::check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "shard: cudaStreamSynchronize");
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::set(device_stream stream, int g, int i,
                                                            std::span<const accumulate> whole) {
  this->expect_settable(g, i, whole.size());
  states_[index(g)].gather = gather_state::absent;  // what stays gathered would be stale
  const tensor part = local(g, i);
  const auto count = static_cast<std::size_t>(part.count);
  std::vector<accumulate> master(count);
  layout(g).copy_part(i, groups_[index(g)].ranks->rank(), whole.data(), master.data());
  const auto copy = [&](void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    detail::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream.get()),
                       "shard: cudaMemcpyAsync");
  };
  copy(part.master, master.data(), count * sizeof(accumulate));
  std::vector<storage> rounded;
  if constexpr (!std::is_same_v<storage, accumulate>) {
    rounded.resize(count);
    detail::copy_elements(master.data(), rounded.data(), part.count, false);
    copy(part.parameter, rounded.data(), count * sizeof(storage));
  }
  detail::check_cuda(cudaStreamSynchronize(stream.get()), "shard: cudaStreamSynchronize");
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::masters_from_parameters(device_stream stream) {
  if constexpr (!std::is_same_v<storage, accumulate>) {
    if (num_tiles_ == 0) return;
    const adamw_device_list<storage, accumulate, Moment> list{memory_.tables.tensors, static_cast<int>(tensors_.size()),
                                                              num_tiles_};
    detail::masters_kernel<<<detail::blocks_for(num_tiles_), detail::part_threads, 0, stream.get()>>>(list);
    detail::expect_launched("masters_kernel");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters

// What `to` gets afterwards comes after what `from` holds now.
template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::fork(device_stream from, CUstream_st* to) {
  detail::check_cuda(cudaEventRecord(forked_, from.get()), "shard: cudaEventRecord");
  detail::check_cuda(cudaStreamWaitEvent(to, forked_, 0), "shard: cudaStreamWaitEvent");
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::gather_now(device_stream stream, int g) {
  group<Comm>& own = groups_[index(g)];
  Comm& comm = own.gather == nullptr ? *own.ranks : *own.gather;
  const auto& tables = memory_.tables.groups[index(g)];
  const std::int64_t row = layout(g).row_elements();
  storage* const mine = memory_.gather_buffer + comm.rank() * row;
  detail::move_parts<true>(stream, tables.own_list, tables.parameter, mine, false);
  comm.all_gather(stream, static_cast<const storage*>(mine), memory_.gather_buffer, row);
  detail::move_parts<false>(stream, tables.whole_list, tables.full, memory_.gather_buffer, false);
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::begin_gather(device_stream stream, int g) {
  if (!this->take_slot(g)) return;
  group_state& s = states_[index(g)];
  try {
    if (gather_stream_ == nullptr) {
      gather_now(stream, g);
      s.gather = gather_state::gathered;
    } else {
      fork(stream, gather_stream_);
      gather_now(gather_stream_, g);
      detail::check_cuda(cudaEventRecord(gathered_[index(g)], gather_stream_), "shard: cudaEventRecord");
    }
  } catch (...) {
    this->free_slot(s);
    throw;
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::end_gather(device_stream stream, int g) {
  group_state& s = states_[index(g)];
  TESSERA_EXPECTS(s.gather != gather_state::absent,
                  "end_gather of shard group '" << groups_[index(g)].name << "' without begin_gather");
  if (s.gather == gather_state::gathered) return;
  detail::check_cuda(cudaStreamWaitEvent(stream.get(), gathered_[index(g)], 0), "shard: cudaStreamWaitEvent");
  s.gather = gather_state::gathered;
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::release(device_stream, int g) {
  this->give_back(g);  // the next gather into this memory comes after what the stream holds then
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
template <class F>
void fully_sharded<Precision, Moment, Reduction, Comm>::forward(device_stream stream, F&& use) {
  for (int g = 0; g < num_groups(); ++g) {
    for (int ahead = g; ahead <= g + choices_.prefetch && ahead < num_groups(); ++ahead) begin_gather(stream, ahead);
    end_gather(stream, g);
    use(g);
    release(stream, g);
  }
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
template <class F>
void fully_sharded<Precision, Moment, Reduction, Comm>::backward(device_stream stream, F&& use) {
  for (int g = num_groups() - 1; g >= 0; --g) {
    for (int ahead = g; ahead >= g - choices_.prefetch && ahead >= 0; --ahead) begin_gather(stream, ahead);
    end_gather(stream, g);
    use(g);
    release(stream, g);
    reduce(stream, g);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::join(device_stream stream) {
  if (!reducing_) return;
  detail::check_cuda(cudaStreamWaitEvent(stream.get(), reduced_, 0), "shard: cudaStreamWaitEvent");
  reducing_ = false;
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::reduce(device_stream stream, int g) {
  group<Comm>& own = groups_[index(g)];
  group_state& s = states_[index(g)];
  auto& m = memory_.groups[index(g)];
  const auto& tables = memory_.tables.groups[index(g)];
  if (!this->starts_reduction(g)) return;
  const std::int64_t row = layout(g).row_elements();
  const std::int64_t stride = layout(g).ranks() * row;
  join(stream);  // the last reduction has read what is packed now
  for (std::int64_t chunk = 0; chunk < own.chunks; ++chunk) {
    gradient* const* const whole = tables.contribution + chunk * layout(g).num_parameters();
    accumulate* const packed = memory_.packed + (Reduction::keeps_chunks ? chunk * stride : 0);
    detail::move_parts<true>(stream, tables.whole_list, whole, packed, !Reduction::keeps_chunks && chunk > 0);
  }
  this->gradients_are_read(g);
  device_stream lane = stream;
  if (reduce_stream_ != nullptr) {
    fork(stream, reduce_stream_);
    lane = reduce_stream_;
  }
  const auto end = [&] {
    if (reduce_stream_ == nullptr) return;
    detail::check_cuda(cudaEventRecord(reduced_, reduce_stream_), "shard: cudaEventRecord");
    reducing_ = true;
  };

  const bool replicated = this->replicated(g);
  accumulate* rows = replicated && !s.half_reduced ? m.rows : memory_.rows;
  s.num_rows = Reduction::scatter(lane, *own.ranks, static_cast<const accumulate*>(memory_.packed),
                                  std::span<const std::int64_t>(chunks_[index(g)]), row, rows, memory_.workspace);
  if (s.half_reduced) {
    detail::add_elements(lane, rows, m.rows, s.num_rows * row);
    rows = m.rows;
  }
  if (replicated) {
    s.half_reduced = true;
    if (!this->all_reduce_) return end();
  }
  Reduction::join(lane, replicated ? own.replicas : nullptr, static_cast<const accumulate*>(rows),
                  std::span<const std::int64_t>(rows_[index(g)]), row, memory_.result, memory_.workspace);
  s.half_reduced = false;
  detail::move_parts<false>(lane, tables.own_list, tables.sum, memory_.result, s.summed);
  s.summed = true;
  end();
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::divide_gradients(device_stream stream, double divisor) {
  this->expect_divisor(divisor);
  join(stream);
  if (num_tiles_ == 0) return;
  const adamw_device_list<storage, accumulate, Moment> list{memory_.tables.tensors, static_cast<int>(tensors_.size()),
                                                            num_tiles_};
  detail::divide_kernel<<<detail::blocks_for(num_tiles_), detail::part_threads, 0, stream.get()>>>(
      list, static_cast<accumulate>(divisor));
  detail::expect_launched("divide_kernel");
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
const double* fully_sharded<Precision, Moment, Reduction, Comm>::gradient_norm(device_stream stream, double max_norm,
                                                                               Comm* stages) {
  this->expect_gradients("gradient_norm");
  join(stream);
  const auto& tables = memory_.tables;
  exact_sum* const squares = memory_.squares;
  const std::size_t num_sums = norm_order_.size();
  if (num_sums > 0) {
    detail::check_cuda(cudaMemsetAsync(squares, 0, num_sums * sizeof(exact_sum), stream.get()),
                       "shard: cudaMemsetAsync");
    const adamw_device_list<storage, accumulate, Moment> list{tables.tensors, static_cast<int>(tensors_.size()),
                                                              num_tiles_};
    const dim3 blocks(64, static_cast<unsigned>(num_sums));
    detail::squares_kernel<<<blocks, detail::part_threads, 0, stream.get()>>>(list, tables.ranges, squares);
    detail::expect_launched("squares_kernel");
  }
  const auto sum_over = [&](Comm& comm, exact_sum* sums, std::size_t count) {
    auto* const words = reinterpret_cast<std::int64_t*>(sums);
    comm.all_reduce(stream, static_cast<const std::int64_t*>(words), words,
                    static_cast<std::int64_t>(count) * detail::exact_words);
  };
  for (std::size_t first = 0; first < num_sums;) {  // groups [first, last) have the same communicators
    const group<Comm>& own = groups_[index(norm_order_[first])];
    std::size_t last = first;
    while (last < num_sums && this->same_norm(norm_order_[last], norm_order_[first])) ++last;
    sum_over(*own.ranks, squares + first, last - first);
    for (Comm* comm : own.distinct) sum_over(*comm, squares + first, last - first);
    first = last;
  }
  detail::add_squares_kernel<<<1, 128, 0, stream.get()>>>(squares, static_cast<int>(num_sums), tables.total);
  detail::expect_launched("add_squares_kernel");
  if (stages != nullptr) sum_over(*stages, tables.total, 1);
  detail::norm_kernel<<<1, 1, 0, stream.get()>>>(tables.total, max_norm, tables.norm, tables.control);
  detail::expect_launched("norm_kernel");
  scaled_ = true;
  return &tables.norm->norm;
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
double fully_sharded<Precision, Moment, Reduction, Comm>::wait_for_norm(device_stream stream) {
  if constexpr (requires(Comm & c) { c.wait(stream); }) {
    if (!groups_.empty()) groups_.front().ranks->wait(stream);
  }
  const auto read = [&](void* to, const void* from, std::size_t bytes) {
    detail::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream.get()),
                       "shard: cudaMemcpyAsync");
    detail::check_cuda(cudaStreamSynchronize(stream.get()), "shard: cudaStreamSynchronize");
  };
  detail::norm_result result{};
  read(&result, memory_.tables.norm, sizeof(result));
  if (result.not_finite == 0) return result.norm;
  std::vector<exact_sum> squares(norm_order_.size());
  if (!squares.empty()) read(squares.data(), memory_.squares, squares.size() * sizeof(exact_sum));
  std::ostringstream text;
  text << "gradients are not finite:";
  bool own = false;
  for (std::size_t k = 0; k < squares.size(); ++k) {
    if (squares[k].not_finite == 0) continue;
    own = true;
    text << " group '" << groups_[index(norm_order_[k])].name << "' (" << squares[k].not_finite << " elements)";
  }
  if (!own) text << " in another pipeline stage (" << result.not_finite << " elements)";
  throw error(text.str());
}

// ---------------------------------------------------------------------------------------------------------------------
// The step

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::update(device_stream stream, const adamw_options& choices) {
  adamw(stream, choices, control(),
        adamw_device_list<storage, accumulate, Moment>{memory_.tables.tensors, static_cast<int>(tensors_.size()),
                                                       num_tiles_});
  scaled_ = false;
  this->end_step();
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::step(device_stream stream, const adamw_options& choices,
                                                             std::int64_t t, double rate) {
  this->expect_step();
  expect_adamw(choices, t, rate, 1.0);
  join(stream);
  detail::control_kernel<<<1, 1, 0, stream.get()>>>(control(), t - 1, rate, true, !scaled_);
  detail::expect_launched("control_kernel");
  update(stream, choices);
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::step(device_stream stream, const adamw_options& choices) {
  this->expect_step();
  expect_adamw(choices, 1, 0.0, 1.0);
  join(stream);
  if (!scaled_) {
    detail::control_kernel<<<1, 1, 0, stream.get()>>>(control(), 0, 0.0, false, true);
    detail::expect_launched("control_kernel");
  }
  update(stream, choices);
}

template <precision_policy Precision, storage_type Moment, class Reduction, device_communicator Comm>
void fully_sharded<Precision, Moment, Reduction, Comm>::abandon_step(device_stream stream) {
  for (int g = 0; g < num_groups(); ++g) {
    if (states_[index(g)].gather == gather_state::under_way) end_gather(stream, g);
  }
  join(stream);
  scaled_ = false;
  this->forget_step();
}

}  // namespace shard
TESSERA_NAMESPACE_END
