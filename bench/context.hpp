// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What every benchmark says of itself: the processor, the compiler and the library it measures, so that a table of
// figures can be read later. TESSERA_BENCHMARK_MAIN() stands where BENCHMARK_MAIN() would.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>

#include <tessera/core/version.hpp>

namespace tessera_bench {

// The processor's model as the system names it.
inline std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const auto colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

// The widest vectors that the compiler was allowed to use; what `-march` makes of it.
inline const char* instruction_set() {
#if defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
  return "AVX2 and FMA";
#elif defined(__AVX__)
  return "AVX";
#else
  return "the compiler's default";
#endif
}

inline void add_context() {
  benchmark::AddCustomContext("cpu_model", cpu_model());
#if defined(__clang__)
  benchmark::AddCustomContext("compiler", "clang " __clang_version__);
#else
  benchmark::AddCustomContext("compiler", "gcc " __VERSION__);
#endif
  benchmark::AddCustomContext("instruction_set", instruction_set());
  benchmark::AddCustomContext("tessera_version", std::to_string(TESSERA_VERSION_MAJOR) + "." +
                                                     std::to_string(TESSERA_VERSION_MINOR) + "." +
                                                     std::to_string(TESSERA_VERSION_PATCH));
#if !defined(__OPTIMIZE__)
  benchmark::AddCustomContext("warning", "compiled without optimisation: the figures mean nothing");
#endif
}

// Counters of one iteration's work, shown as rates: floating-point operations (a multiply and an add are two), bytes
// that must be read and written at least, and whatever is being counted.
inline void report_rates(benchmark::State& state, double flops, double bytes, double items = 0) {
  using benchmark::Counter;
  if (flops > 0) state.counters["flops"] = Counter(flops, Counter::kIsIterationInvariantRate, Counter::kIs1000);
  if (bytes > 0) state.counters["bytes"] = Counter(bytes, Counter::kIsIterationInvariantRate, Counter::kIs1000);
  if (items > 0) state.counters["items"] = Counter(items, Counter::kIsIterationInvariantRate, Counter::kIs1000);
}

// Sets the context and runs what the command line asks for.
inline int run(int argc, char** argv) {
  add_context();
  benchmark::Initialize(&argc, argv);
  if (argc > 0) {  // the name of the benchmark, without where it was built
    const char* const slash = std::strrchr(argv[0], '/');
    benchmark::BenchmarkReporter::Context::executable_name = slash == nullptr ? argv[0] : slash + 1;
  }
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace tessera_bench

// The main function of a benchmark that registers its cases with BENCHMARK.
#define TESSERA_BENCHMARK_MAIN() \
  int main(int argc, char** argv) { return ::tessera_bench::run(argc, argv); }
