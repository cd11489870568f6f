// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Counts what the whole executable allocates, to see that a training step allocates nothing. Not in sanitizer builds,
// which have operators of their own.

#if defined(__has_feature)
#define TEST_HAS_FEATURE(x) __has_feature(x)
#else
#define TEST_HAS_FEATURE(x) 0
#endif
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !TEST_HAS_FEATURE(address_sanitizer) && \
    !TEST_HAS_FEATURE(thread_sanitizer)

#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include <tessera/comm/self.hpp>
#include <tessera/shard/shard.hpp>

namespace {
std::atomic<long> allocations{0};
}

// Not inlined: GCC would take one of these and the library's other one for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes == 0 ? 1 : bytes)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;

template <class Reduction>
long allocations_of_a_step(bool background, std::int64_t chunks) {
  using comm_type = ts::comm::self<ts::space::host>;
  comm_type self, gather;
  std::vector<sh::group<comm_type>> groups;
  std::vector<sh::group_shape> shapes;
  for (int g = 0; g < 4; ++g) {
    groups.push_back({.name = "layer",
                      .parameters = {{.name = "w", .whole = ts::box::whole({7 + g, 9})}},
                      .ranks = &self,
                      .gather = background ? &gather : nullptr,
                      .chunks = chunks,
                      .max_chunks = chunks});
    shapes.push_back(sh::shape_of(groups.back()));
  }
  const auto sizes = sh::memory_of<ts::precision::bf16, float, Reduction>(shapes, {});
  ts::host_buffer state(sizes.state()), step(sizes.step());
  sh::fully_sharded<ts::precision::bf16, float, Reduction, comm_type> model(groups, {}, ts::state_memory(state),
                                                                            sh::step_memory(step));
  long before = 0;
  for (int t = 1; t <= 3; ++t) {
    before = allocations;
    model.forward([](int) {});
    model.backward([&](int g) {
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (auto& x : model.full_gradient(g, 0, chunk)) x = 1;
      }
    });
    model.divide_gradients(2);
    model.step({}, t, 1e-3, sh::clip_factor(model.gradient_norm(), 1.0));
  }
  return allocations - before;
}

TEST_CASE("a step allocates nothing once the communicators have seen one") {
  CHECK(allocations > 0);  // or they are not counted
  for (const bool background : {false, true}) {
    CHECK(allocations_of_a_step<ts::reduction::native>(background, 1) == 0);
    CHECK(allocations_of_a_step<ts::reduction::ordered>(background, 3) == 0);
  }
}

}  // namespace

#endif
