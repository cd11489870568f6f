// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of save.hpp.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <tessera/checkpoint/detail/checksum.hpp>
#include <tessera/checkpoint/save.hpp>
#include <tessera/core/nvtx.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

template <class Comm>
saver<Comm>::saver(Comm& comm, save_options options) : comm_(&comm), options_(std::move(options)) {
  TESSERA_EXPECTS(!options_.directory.empty(), "a saver needs a directory for its checkpoints");
  TESSERA_EXPECTS(options_.keep_last >= 0, "keep_last is " << options_.keep_last << ", it must be at least 0 (all)");
}

template <class Comm>
saver<Comm>::~saver() {
  if (worker_.joinable()) worker_.join();
}

template <class Comm>
std::string saver<Comm>::save(const save_plan& plan, std::span<const source_piece> pieces, const train_state& state) {
  [[maybe_unused]] const nvtx_range range("tessera::checkpoint::saver::save");
  wait();
  job work = begin(plan, pieces, state);
  work.plan = &plan;
  detail::chunk_sources sources;
  work.result = detail::attempt([&] { sources = detail::find_sources(plan, comm_->rank(), pieces); });
  if (!work.result.failed) write(work, sources);
  return commit(work);
}

template <class Comm>
void saver<Comm>::save_async(const save_plan& plan, std::span<const source_piece> pieces, const train_state& state) {
  [[maybe_unused]] const nvtx_range range("tessera::checkpoint::saver::save_async");
  wait();
  job work = begin(plan, pieces, state);
  detail::chunk_sources sources;
  const detail::outcome staged = detail::attempt([&] {
    sources = detail::find_sources(plan, comm_->rank(), pieces);
    staging_.reserve(plan.bytes[static_cast<std::size_t>(comm_->rank())]);
    detail::stage(plan, comm_->rank(), sources, staging_.data());
    work.plan_copy = plan;
  });
  start(std::move(work), std::move(sources), staged, {});
}

template <class Comm>
void saver<Comm>::save_in_background(const save_plan& plan, std::span<const source_piece> pieces,
                                     const train_state& state, std::function<void()> before) {
  wait();
  job work = begin(plan, pieces, state);
  detail::chunk_sources sources;
  const detail::outcome found = detail::attempt([&] {
    sources = detail::find_sources(plan, comm_->rank(), pieces);
    work.plan_copy = plan;
  });
  start(std::move(work), std::move(sources), found, std::move(before));
}

template <class Comm>
void saver<Comm>::start(job work, detail::chunk_sources sources, const detail::outcome& prepared,
                        std::function<void()> before) {
  job_ = std::move(work);
  job_->plan = &job_->plan_copy;
  if (prepared.failed) {  // out of memory: known to all when the save is completed
    job_->result = prepared;
    written_ = true;
    return;
  }
  written_ = false;
  try {
    worker_ = std::thread([this, sources = std::move(sources), before = std::move(before)] {
      const detail::outcome ready = detail::attempt([&] {
        if (before) before();
      });
      if (ready.failed) {
        job_->result = ready;
      } else {
        write(*job_, sources);
      }
      written_ = true;
    });
  } catch (const std::system_error& e) {
    job_->result = {true, std::string("no thread can be started: ") + e.what()};
    written_ = true;
  }
}

template <class Comm>
std::string saver<Comm>::wait() {
  if (!job_) return {};
  [[maybe_unused]] const nvtx_range range("tessera::checkpoint::saver::wait");
  if (worker_.joinable()) worker_.join();
  job work = std::move(*job_);
  work.plan = &work.plan_copy;
  job_.reset();
  return commit(work);
}

template <class Comm>
std::string saver<Comm>::try_commit() {
  if (!job_) return {};
  const std::int32_t own = written_ ? 1 : 0;
  std::int32_t all = 0;
  comm_->all_reduce(host_stream{}, &own, &all, 1, reduce_op::min);
  return all == 1 ? wait() : std::string();
}

template <class Comm>
typename saver<Comm>::job saver<Comm>::begin(const save_plan& plan, std::span<const source_piece> pieces,
                                             const train_state& state) {
  job work;
  work.state = state;
  detail::together(*comm_, [&] {
    TESSERA_EXPECTS(plan.num_ranks == comm_->size(),
                    "the plan is for " << plan.num_ranks << " ranks, the communicator has " << comm_->size());
    detail::find_sources(plan, comm_->rank(), pieces);
    if (comm_->rank() != 0) return;
    // what the manifest would refuse, before anything is written
    step_name(state.step);
    manifest content;
    content.block_bytes = min_block_bytes;
    content.state = state;
    to_json(content);
  });
  std::array<std::uint64_t, 2> digests{plan.digest, static_cast<std::uint64_t>(state.step)};
  std::array<std::uint64_t, 2> least{};
  std::array<std::uint64_t, 2> most{};
  comm_->all_reduce(host_stream{}, digests.data(), least.data(), 2, reduce_op::min);
  comm_->all_reduce(host_stream{}, digests.data(), most.data(), 2, reduce_op::max);
  TESSERA_EXPECTS_AS(checkpoint_error, least == most,
                     (least[0] != most[0] ? "ranks have different plans" : "ranks save different steps")
                         << "; all must make the plan of the same pieces with the same options and save the same step");

  detail::together(*comm_, [&] {
    if (comm_->rank() != 0) return;
    std::error_code code;
    std::filesystem::create_directories(options_.directory, code);
    if (code) throw checkpoint_error(options_.directory + ": the folder cannot be made: " + code.message());
    clean_up();
    std::random_device device;
    const auto now = static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
    work.nonce = detail::checksum_text((std::uint64_t{device()} << 32 | device()) ^ now);
    work.unfinished = final_path(work) + std::string(detail::unfinished_mark) + work.nonce;
    detail::create_directory(work.unfinished, options_.observer);
  });
  work.unfinished = detail::broadcast_bytes(*comm_, work.unfinished, 0);
  return work;
}

template <class Comm>
void saver<Comm>::write(job& work, const detail::chunk_sources& sources) {
  work.result = detail::attempt([&] {
    const int rank = comm_->rank();
    if (work.plan->writes[static_cast<std::size_t>(rank)].empty()) return;
    work.written =
        detail::write_rank_file(*work.plan, rank, sources, detail::join(work.unfinished, detail::rank_file_name(rank)),
                                options_.sync, options_.observer);
  });
}

template <class Comm>
std::string saver<Comm>::commit(job& work) {
  bytes_written_ = work.written.bytes;
  try {
    detail::agree(*comm_, work.result);
    const std::vector<std::string> written = detail::gather_bytes(*comm_, detail::packed_description(work.written));
    detail::together(*comm_, [&] {
      if (comm_->rank() == 0) publish(work, written);
    });
  } catch (...) {
    if (comm_->rank() == 0) {
      detail::attempt([&] { detail::remove_tree(work.unfinished, {}); });  // or else the next save does it
    }
    throw;
  }
  return final_path(work);
}

template <class Comm>
void saver<Comm>::publish(job& work, const std::vector<std::string>& written) {
  const io_observer& observer = options_.observer;
  const auto sync = [&](const std::string& path) {
    if (options_.sync) detail::sync_directory(path, observer);
  };
  const auto write_text = [&](const std::string& path, std::string_view text) {
    detail::file target = detail::file::create(path, observer);
    target.write(text.data(), static_cast<std::int64_t>(text.size()), 0, observer);
    if (options_.sync) target.sync(observer);
    target.close();
  };
  std::vector<detail::written_file> files;
  for (const std::string& bytes : written) files.push_back(detail::unpacked_description(bytes));
  const manifest content = detail::make_manifest(*work.plan, work.state, files);
  expect_manifest(content, detail::join(work.unfinished, manifest_name));  // before anything older is deleted
  write_text(detail::join(work.unfinished, manifest_name), to_json(content));
  sync(work.unfinished);

  const std::string path = final_path(work);
  if (std::filesystem::exists(path)) {
    TESSERA_EXPECTS_AS(checkpoint_error, detail::exchange_paths(work.unfinished, path, observer),
                       path << ": it exists, and this file system cannot replace a folder in one step; delete it to "
                               "save this step again");
    sync(options_.directory);
    detail::remove_tree(work.unfinished, observer);
  } else {
    detail::rename_path(work.unfinished, path, observer);
    sync(options_.directory);
  }

  const std::string latest = detail::join(options_.directory, latest_name);
  const std::string unfinished = latest + std::string(detail::unfinished_mark) + work.nonce;
  write_text(unfinished, step_name(work.state.step) + "\n");
  detail::rename_path(unfinished, latest, observer);
  sync(options_.directory);
  // the checkpoint is there: what goes wrong from here on is no reason to say that it is not
  const detail::outcome pruned = detail::attempt([&] { prune(); });
  if (pruned.failed) options_.log(log_level::warning, "old checkpoints stay: ", pruned.text);
  options_.log(log_level::info, "saved ", path);
}

template <class Comm>
void saver<Comm>::clean_up() {
  for (const std::string& name : detail::names_in(options_.directory)) {
    if (!detail::is_unfinished(name)) continue;
    options_.log(log_level::info, "deleting ", name, ", which an earlier save left unfinished");
    detail::remove_tree(detail::join(options_.directory, name), options_.observer);
  }
}

template <class Comm>
void saver<Comm>::prune() {
  if (options_.keep_last == 0) return;
  std::string latest = detail::read_text(detail::join(options_.directory, latest_name), 4096, options_.observer);
  while (!latest.empty() && latest.back() == '\n') latest.pop_back();
  std::vector<std::int64_t> steps = list_steps(options_.directory);
  const auto excess = static_cast<std::int64_t>(steps.size()) - options_.keep_last;
  for (std::int64_t i = 0; i < excess; ++i) {
    const std::string name = step_name(steps[static_cast<std::size_t>(i)]);
    if (name == latest) continue;
    const std::string path = detail::join(options_.directory, name);
    const std::string unfinished = path + std::string(detail::unfinished_mark) + "old";
    detail::rename_path(path, unfinished, options_.observer);  // half of it must not look like a checkpoint
    detail::remove_tree(unfinished, options_.observer);
  }
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
