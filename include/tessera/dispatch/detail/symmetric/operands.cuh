// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/handle.hpp>
#include <tessera/router/detail/device/warp.cuh>

// What operations between GPUs that reach each other's memory ask of what they are given.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// Arrays that peers write: in the window, and in lines of 16 bytes.
template <class Comm, class T>
void expect_window(const Comm& comm, const T* data, std::int64_t count, const char* what) {
  const bool inside = data != nullptr && comm.contains(data) && (count == 0 || comm.contains(data + count - 1));
  TESSERA_EXPECTS(inside, what << " is not memory of this communicator: take it from comm::symmetric::allocate");
}

template <class S>
void expect_bulk_rows(const matrix_view<S>& rows, const char* what) {
  const auto bytes = static_cast<std::int64_t>(sizeof(S));
  TESSERA_EXPECTS(rows.cols * bytes % bulk::alignment == 0 && rows_are_aligned(rows, bulk::alignment),
                  what << ": rows of " << rows.cols << " elements, " << rows.stride << " apart, at "
                       << static_cast<const void*>(rows.data)
                       << ": size, distance and address must be multiples of 16 bytes");
}

inline int expect_sm90(const char* operation) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  TESSERA_EXPECTS(major >= 9,
                  operation << " over comm::symmetric needs compute capability 9.0, this device has major " << major);
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// Tokens per rank that an array of all ranks' rows has room for.
inline std::int64_t tokens_of(std::int64_t rows, int ranks, const char* what) {
  TESSERA_EXPECTS(rows % ranks == 0,
                  what << " has " << rows << " rows, it needs max_tokens for each of " << ranks << " ranks");
  return rows / ranks;
}

// What a handle was laid out for, against what an operation is given.
template <class A>
void expect_tokens(const dispatch_handle<A>& handle, std::int64_t max_tokens, const char* what) {
  TESSERA_EXPECTS(max_tokens == handle.max_tokens,
                  what << " has room for " << max_tokens
                       << " tokens of a rank, the handle is of max_tokens = " << handle.max_tokens);
}
template <class A>
void expect_top_k(const dispatch_handle<A>& handle, std::int64_t top_k) {
  TESSERA_EXPECTS(top_k == handle.top_k, "top_k = " << top_k << ", the handle is of top_k = " << handle.top_k);
}

// What every transport of a dispatch asks of its rows. @return max_tokens.
template <class Comm, class S>
std::int64_t expect_dispatch(const Comm& comm, const matrix_view<const S>& x, const matrix_view<S>& received) {
  const std::int64_t max_tokens = tokens_of(received.rows, comm.size(), "received");
  expect_matrix(x, -1, received.cols, "rows to dispatch");
  TESSERA_EXPECTS(x.rows <= max_tokens, x.rows << " tokens, there is room for " << max_tokens << " of each rank");
  expect_bulk_rows(x, "rows to dispatch");
  expect_bulk_rows(received, "received");
  TESSERA_EXPECTS(received.stride == received.cols,
                  "received rows are " << received.stride << " elements apart, they must be packed");
  expect_window(comm, received.data, received.rows * received.stride, "received");
  return max_tokens;
}

// What every transport of a combine asks of its rows. @return max_tokens.
template <class Comm, class A, class S, class Out>
std::int64_t expect_combine(const Comm& comm, const dispatch_handle<A>& handle, bool summed,
                            const matrix_view<const S>& rows, const matrix_view<S>& returned,
                            const matrix_view<const S>& plus, const matrix_view<Out>& y) {
  const std::int64_t max_tokens = tokens_of(returned.rows, comm.size(), "returned");
  expect_matrix(rows, -1, y.cols, "rows to combine");
  expect_matrix(returned, -1, y.cols, "returned");
  TESSERA_EXPECTS(y.rows <= max_tokens, y.rows << " tokens, there is room for " << max_tokens << " of each rank");
  TESSERA_EXPECTS(!summed || rows.rows == returned.rows,
                  "summed rows: " << rows.rows << " rows, expected one for each of " << returned.rows << " tokens");
  TESSERA_EXPECTS(handle.top_k >= 1 && handle.top_k <= warp_size,
                  "the handle is of top_k = " << handle.top_k << ", expected 1 to 32");
  expect_tokens(handle, max_tokens, "returned");
  if (plus.data != nullptr) expect_matrix(plus, y.rows, y.cols, "rows to add");
  expect_bulk_rows(rows, "rows to combine");
  expect_bulk_rows(returned, "returned");
  expect_bulk_rows(plus, "rows to add");
  expect_bulk_rows(y, "combined rows");
  TESSERA_EXPECTS(returned.stride == returned.cols,
                  "returned rows are " << returned.stride << " elements apart, they must be packed");
  TESSERA_EXPECTS(handle.destinations != nullptr, "the handle has no destinations: it does not travel");
  expect_window(comm, returned.data, returned.rows * returned.stride, "returned");
  TESSERA_EXPECTS(max_tokens <= INT32_MAX && y.cols <= INT32_MAX, "rows of " << y.cols << " elements are too wide");
  return max_tokens;
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
