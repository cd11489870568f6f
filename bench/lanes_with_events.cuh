// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// When the phases of an overlapped pair begin and end.

#include <cstddef>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/pipeline/overlap.cuh>

#include "gpu_timing.cuh"

namespace tessera_bench {

// Lanes with events around their phases; those of the last pair that has run stay.
template <class Lanes>
class lanes_with_events {
 public:
  using space = typename Lanes::space;
  static constexpr bool concurrent = Lanes::concurrent;
  struct span {
    tessera::pipeline::overlap_node node;
    double begin_us, end_us;  // from the first begin
  };

  template <class... Options>
  explicit lanes_with_events(const Options&... options) : lanes_(options...) {}
  lanes_with_events(const lanes_with_events&) = delete;
  lanes_with_events& operator=(const lanes_with_events&) = delete;
  ~lanes_with_events() {
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  template <class Execute, class Fail>
  void run(tessera::device_stream stream, const tessera::pipeline::overlap_order& order, Execute&& execute,
           Fail&& fail) {
    nodes_ = order.nodes;
    while (events_.size() < 2 * nodes_.size()) {
      events_.push_back(nullptr);
      require(cudaEventCreate(&events_.back()), "cudaEventCreate");
    }
    const auto execute_with_events = [&](const tessera::pipeline::overlap_node& node,
                                         const tessera::pipeline::lane<space>& where) {
      const auto i = static_cast<std::size_t>(&node - order.nodes.data());
      record(events_[2 * i], where.stream.get());
      execute(node, where);
      record(events_[2 * i + 1], where.stream.get());
    };
    lanes_.run(stream, order, execute_with_events, fail);
  }

  std::vector<span> spans() const {
    std::vector<span> result;
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      result.push_back({nodes_[i], since_begin(events_[2 * i]), since_begin(events_[2 * i + 1])});
    }
    return result;
  }

 private:
  // In a graph as a node that records, whenever the graph runs.
  static void record(cudaEvent_t event, cudaStream_t stream) {
    cudaStreamCaptureStatus status{};
    require(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    const bool captured = status == cudaStreamCaptureStatusActive;
    require(cudaEventRecordWithFlags(event, stream, captured ? cudaEventRecordExternal : cudaEventRecordDefault),
            "cudaEventRecordWithFlags");
  }
  double since_begin(cudaEvent_t event) const {
    float ms = 0;
    require(cudaEventElapsedTime(&ms, events_[0], event), "cudaEventElapsedTime");
    return 1e3 * static_cast<double>(ms);
  }

  Lanes lanes_;
  std::vector<tessera::pipeline::overlap_node> nodes_;
  std::vector<cudaEvent_t> events_;  // two for each node
};

}  // namespace tessera_bench
