// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoints.hpp"

#include <cstdio>
#include <string_view>
#include <utility>
#include <vector>

#include <tessera/comm/threads.hpp>
#include <tessera/core/error.hpp>
#if defined(TRAIN_LM_HAS_MPI)
#include <tessera/comm/mpi.hpp>
#endif
#if defined(TRAIN_LM_HAS_CHECKPOINT)
#include <tessera/checkpoint/directory.hpp>
#include <tessera/checkpoint/load.hpp>
#include <tessera/checkpoint/save.hpp>
#endif

namespace train_lm {

#if defined(TRAIN_LM_HAS_CHECKPOINT)

namespace {

namespace ck = ts::checkpoint;

/// Warnings of the library on stderr; only its rank 0 makes them.
ts::log_sink notes() {
  return {[](void*, ts::log_level, std::string_view text) {
            std::fprintf(stderr, "train_lm: %.*s\n", static_cast<int>(text.size()), text.data());
          },
          nullptr, ts::log_level::warning};
}

}  // namespace

template <class Comm>
struct checkpoints<Comm>::implementation {
  Comm& comm;
  std::string directory;
  ck::saver<Comm> saver;
};

template <class Comm>
checkpoints<Comm>::checkpoints(Comm& comm, const std::string& directory, int keep)
    : implementation_(new implementation{
          comm, directory, ck::saver<Comm>(comm, {.directory = directory, .keep_last = keep, .log = notes()})}) {}

template <class Comm>
std::optional<found_checkpoint> checkpoints<Comm>::find() {
  const auto path = ck::find_checkpoint(implementation_->comm, implementation_->directory, notes());
  if (!path) return std::nullopt;
  const ck::manifest content = ck::read_manifest(*path);
  found_checkpoint result{*path, content.state, {}};
  for (const ck::manifest_tensor& tensor : content.tensors) result.shapes.emplace(tensor.name, tensor.whole);
  return result;
}

template <class Comm>
std::int64_t checkpoints<Comm>::load(const found_checkpoint& from, std::span<const ck::target_piece> pieces) {
  return ck::load(implementation_->comm, from.path, pieces, {.log = notes()}).bytes_read;
}

template <class Comm>
void checkpoints<Comm>::save(std::span<const ck::target_piece> pieces, const ck::train_state& state) {
  const std::vector<ck::source_piece> sources(pieces.begin(), pieces.end());
  // Made for each save, because the history of the run grows; it takes one exchange of descriptions.
  implementation_->saver.save_async(ck::make_plan(implementation_->comm, sources), sources, state);
}

template <class Comm>
void checkpoints<Comm>::poll() {
  if (implementation_->saver.pending()) implementation_->saver.try_commit();
}

template <class Comm>
void checkpoints<Comm>::wait() {
  implementation_->saver.wait();
}

#else

template <class Comm>
struct checkpoints<Comm>::implementation {};

template <class Comm>
checkpoints<Comm>::checkpoints(Comm&, const std::string& directory, int) {
  throw ts::error("--checkpoint " + directory +
                  ": built without checkpoints, which need nlohmann/json and xxHash (Debian: nlohmann-json3-dev "
                  "libxxhash-dev)");
}

template <class Comm>
std::optional<found_checkpoint> checkpoints<Comm>::find() {
  return std::nullopt;
}

template <class Comm>
std::int64_t checkpoints<Comm>::load(const found_checkpoint&, std::span<const ts::checkpoint::target_piece>) {
  return 0;
}

template <class Comm>
void checkpoints<Comm>::save(std::span<const ts::checkpoint::target_piece>, const ts::checkpoint::train_state&) {}

template <class Comm>
void checkpoints<Comm>::poll() {}

template <class Comm>
void checkpoints<Comm>::wait() {}

#endif

template <class Comm>
checkpoints<Comm>::~checkpoints() = default;

template class checkpoints<ts::comm::threads>;
#if defined(TRAIN_LM_HAS_MPI)
template class checkpoints<ts::comm::mpi>;
#endif

}  // namespace train_lm
