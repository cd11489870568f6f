// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Ranks of a test that may be threads of a process, processes that the test starts itself, or those of mpirun: what
// they need of each other is an all-gather of bytes.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <tessera/comm/nccl.hpp>
#include <tessera/comm/threads.hpp>
#if defined(TESSERA_HAS_MPI)
#include <tessera/comm/mpi.hpp>
#endif

#include "gpu_ranks.cuh"

extern char** environ;

namespace device_test {

/// One rank before there is a communicator.
struct bootstrap {
  int rank;
  int size;
  tessera::comm::nccl::all_gather_function gather;

  /// Everyone's elements, in the order of ranks. @param own This rank's, any number of them.
  template <class T>
  std::vector<T> join(const std::vector<T>& own) const {
    const auto count = static_cast<std::uint64_t>(own.size());
    std::vector<std::uint64_t> counts(static_cast<std::size_t>(size));
    gather(&count, counts.data(), sizeof(count));
    const std::uint64_t most = *std::max_element(counts.begin(), counts.end());
    std::vector<T> padded = own;
    padded.resize(most);
    std::vector<T> all(most * counts.size());
    if (most > 0) gather(padded.data(), all.data(), most * sizeof(T));
    std::vector<T> joined;
    for (std::size_t r = 0; r < counts.size(); ++r) {
      const auto* part = all.data() + r * most;
      joined.insert(joined.end(), part, part + counts[r]);
    }
    return joined;
  }
  void barrier() const {
    std::vector<char> all(static_cast<std::size_t>(size));
    const char own = 0;
    gather(&own, all.data(), 1);
  }
};

/// Over a communicator of host memory.
template <class Comm>
bootstrap bootstrap_over(Comm& comm) {
  return {comm.rank(), comm.size(), [&comm](const void* send, void* recv, std::size_t bytes) {
            comm.all_gather({}, static_cast<const std::byte*>(send), static_cast<std::byte*>(recv),
                            static_cast<std::int64_t>(bytes));
          }};
}

/// Memory that the processes of a test share, by a file.
class shared_region {
 public:
  static constexpr std::size_t slot_bytes = std::size_t{1} << 20;
  static constexpr int max_ranks = 8;

  /// @param path Of the file, which is there and large enough.
  explicit shared_region(const std::string& path) {
    const int file = open(path.c_str(), O_RDWR);
    if (file < 0) throw std::runtime_error("cannot open " + path);
    void* const memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) throw std::runtime_error("cannot map " + path);
    words_ = static_cast<header*>(memory);
  }
  shared_region(const shared_region&) = delete;
  shared_region& operator=(const shared_region&) = delete;
  ~shared_region() { munmap(words_, bytes()); }
  static constexpr std::size_t bytes() { return sizeof(header) + max_ranks * slot_bytes; }

  void all_gather(int rank, int size, const void* send, void* recv, std::size_t count) {
    for (std::size_t first = 0; first < count; first += slot_bytes) {
      const std::size_t part = std::min(slot_bytes, count - first);
      std::memcpy(slot(rank), static_cast<const std::byte*>(send) + first, part);
      meet(size);
      for (int r = 0; r < size; ++r) {
        std::memcpy(static_cast<std::byte*>(recv) + static_cast<std::size_t>(r) * count + first, slot(r), part);
      }
      meet(size);
    }
  }

 private:
  struct header {  // a file of zeros is one
    std::atomic<std::uint32_t> arrived;
    std::atomic<std::uint32_t> round;
  };
  std::byte* slot(int rank) const {
    return reinterpret_cast<std::byte*>(words_ + 1) + static_cast<std::size_t>(rank) * slot_bytes;
  }
  void meet(int size) {
    const std::uint32_t round = words_->round.load();
    if (words_->arrived.fetch_add(1) + 1 == static_cast<std::uint32_t>(size)) {
      words_->arrived.store(0);
      words_->round.store(round + 1);
      return;
    }
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
    while (words_->round.load() == round) {
      if (std::chrono::steady_clock::now() > deadline) throw std::runtime_error("another process has not come");
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
  header* words_;
};

/// How this program's ranks are made: see `parse`.
class rank_launcher {
 public:
  static rank_launcher& instance() {
    static rank_launcher one;
    return one;
  }

  /// `--processes N` starts N processes and waits for them; `--hosts H` tells NCCL that ranks of processes are on H
  /// hosts. Without, ranks are threads, or the processes of mpirun where it runs this program. @return an exit code, or
  /// -1 to go on.
  int parse(int argc, char** argv) {
    int processes = 0;
    std::string region;
    for (int i = 1; i + 1 < argc; ++i) {
      const std::string option = argv[i];
      if (option == "--processes") processes = std::atoi(argv[i + 1]);
      if (option == "--hosts") hosts_ = std::atoi(argv[i + 1]);
      if (option == "--rank") rank_ = std::atoi(argv[i + 1]);
      if (option == "--ranks") size_ = std::atoi(argv[i + 1]);
      if (option == "--region") region = argv[i + 1];
    }
    if (processes > 0) return start(processes, argc, argv);
    if (!region.empty()) region_ = std::make_unique<shared_region>(region);
#if defined(TESSERA_HAS_MPI)
    if (std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMI_SIZE") != nullptr) {
      session_ = std::make_unique<tessera::comm::mpi_session>();
      mpi_ = std::make_unique<tessera::comm::mpi>(
          MPI_COMM_WORLD, tessera::comm::mpi_options{.timeout = std::chrono::milliseconds(120000)});
      rank_ = mpi_->rank();
      size_ = mpi_->size();
    }
#endif
    if (!is_process()) return -1;
    // Before NCCL asks.
    if (hosts_ > 1) setenv("NCCL_HOSTID", ("host" + std::to_string(rank_ * hosts_ / size_)).c_str(), 1);
    int gpus = 0;
    const cudaError_t found = cudaGetDeviceCount(&gpus);
    if (found != cudaSuccess || gpus < size_) {
      std::printf("skipped: %d GPUs for %d processes\n", found == cudaSuccess ? gpus : 0, size_);
      return 77;
    }
    require(cudaSetDevice(rank_), "cudaSetDevice");
    return -1;
  }

  bool is_process() const { return size_ > 0; }
  /// Hosts that NCCL takes the processes to be on.
  int hosts() const { return is_process() ? hosts_ : 1; }

  /// Calls `f(bootstrap)` on all ranks: at most four threads, or this process.
  void run(const std::function<void(const bootstrap&)>& f) {
    if (!is_process()) {
      on_ranks((std::min)(num_gpus(), 4), [&](tessera::comm::threads& t) { f(bootstrap_over(t)); });
      return;
    }
#if defined(TESSERA_HAS_MPI)
    if (mpi_) return f(bootstrap_over(*mpi_));
#endif
    f({rank_, size_, [this](const void* send, void* recv, std::size_t bytes) {
         region_->all_gather(rank_, size_, send, recv, bytes);
       }});
  }

 private:
  static int start(int processes, int argc, char** argv) {
    if (processes > shared_region::max_ranks) return EXIT_FAILURE;
    std::string path = (std::filesystem::temp_directory_path() / "tessera_ranks_XXXXXX").string();
    const int file = mkstemp(path.data());
    if (file < 0 || ftruncate(file, static_cast<off_t>(shared_region::bytes())) != 0) return EXIT_FAILURE;
    close(file);
    std::vector<pid_t> children;
    for (int r = 0; r < processes; ++r) {
      std::vector<std::string> words;
      for (int i = 0; i < argc; ++i) {
        if (std::string(argv[i]) == "--processes") {
          ++i;
        } else {
          words.emplace_back(argv[i]);
        }
      }
      for (const std::string& word : {std::string("--region"), path, std::string("--ranks"), std::to_string(processes),
                                      std::string("--rank"), std::to_string(r)}) {
        words.push_back(word);
      }
      std::vector<char*> pointers;
      for (std::string& word : words) pointers.push_back(word.data());
      pointers.push_back(nullptr);
      pid_t child = 0;
      if (posix_spawn(&child, "/proc/self/exe", nullptr, nullptr, pointers.data(), environ) == 0) {
        children.push_back(child);
      }
    }
    int worst = children.size() == static_cast<std::size_t>(processes) ? 0 : EXIT_FAILURE;
    for (const pid_t child : children) {
      int status = 0;
      waitpid(child, &status, 0);
      const int code = WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_FAILURE;
      if (worst == 0 || worst == 77) worst = code == 0 ? worst : code;
    }
    unlink(path.c_str());
    return worst;
  }

  int rank_ = 0;
  int size_ = 0;  // 0: threads
  int hosts_ = 1;
  std::unique_ptr<shared_region> region_;
#if defined(TESSERA_HAS_MPI)
  std::unique_ptr<tessera::comm::mpi_session> session_;  // outlives what follows
  std::unique_ptr<tessera::comm::mpi> mpi_;
#endif
};

}  // namespace device_test
