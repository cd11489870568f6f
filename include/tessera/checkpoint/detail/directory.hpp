// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of directory.hpp.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <tessera/checkpoint/detail/agree.hpp>
#include <tessera/checkpoint/detail/files.hpp>
#include <tessera/checkpoint/directory.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

namespace detail {

/// What names of unfinished things contain; what follows is the save's own number.
inline constexpr std::string_view unfinished_mark = ".tmp-";

/// Names in a folder; none if it does not exist.
inline std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code code;
  std::filesystem::directory_iterator place(directory, code);
  if (code == std::errc::no_such_file_or_directory) return names;
  for (; !code && place != std::filesystem::directory_iterator(); place.increment(code)) {
    names.push_back(place->path().filename().string());
  }
  if (code) throw checkpoint_error(directory + ": the folder cannot be read: " + code.message());
  return names;
}

/// Whether this is something that a save left behind when it was killed.
inline bool is_unfinished(std::string_view name) {
  return (name.rfind("step-", 0) == 0 || name.rfind(latest_name, 0) == 0) &&
         name.find(unfinished_mark) != std::string_view::npos;
}

}  // namespace detail

inline std::string step_name(std::int64_t step) {
  constexpr std::int64_t last = 999'999'999'999'999'999;  // what `step_of` reads
  TESSERA_EXPECTS(step >= 0 && step <= last, "step is " << step << ", it must be 0 to " << last);
  return "step-" + std::to_string(step);
}

inline std::optional<std::int64_t> step_of(std::string_view name) {
  constexpr std::string_view prefix = "step-";
  if (name.rfind(prefix, 0) != 0) return std::nullopt;
  const std::string_view digits = name.substr(prefix.size());
  if (digits.empty() || digits.size() > 18 || (digits.size() > 1 && digits[0] == '0')) return std::nullopt;
  std::int64_t step = 0;
  for (const char c : digits) {
    if (c < '0' || c > '9') return std::nullopt;
    step = step * 10 + (c - '0');
  }
  return step;
}

inline std::vector<std::int64_t> list_steps(const std::string& directory) {
  std::vector<std::int64_t> steps;
  for (const std::string& name : detail::names_in(directory)) {
    if (const auto step = step_of(name)) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

inline manifest read_manifest(const std::string& path, const io_observer& observer) {
  const std::string name = detail::join(path, manifest_name);
  manifest content = parse_manifest(detail::read_text(name, max_manifest_bytes, observer), name);
  for (const manifest_file& listed : content.files) {
    const std::int64_t bytes = detail::file::open(detail::join(path, listed.name)).size();
    TESSERA_EXPECTS_AS(checkpoint_error, bytes == listed.bytes,
                       detail::join(path, listed.name)
                           << ": it has " << bytes << " bytes, the manifest says " << listed.bytes
                           << (bytes < listed.bytes ? ": the file is truncated" : ""));
  }
  return content;
}

inline std::optional<std::string> find_checkpoint(const std::string& directory, const log_sink& log,
                                                  const io_observer& observer) {
  std::string passed_over;  // why, of the first
  const auto is_whole = [&](const std::string& path) {
    const detail::outcome looked = detail::attempt([&] { read_manifest(path, observer); });
    if (looked.failed) log(log_level::warning, "passing over ", path, ": ", looked.text);
    if (looked.failed && passed_over.empty()) passed_over = looked.text;
    return !looked.failed;
  };
  const std::vector<std::int64_t> steps = list_steps(directory);
  std::string named;
  const detail::outcome looked = detail::attempt([&] {
    named = detail::read_text(detail::join(directory, latest_name), 4096, observer);
    while (!named.empty() && (named.back() == '\n' || named.back() == '\r')) named.pop_back();
    TESSERA_EXPECTS_AS(checkpoint_error, step_of(named).has_value(),
                       detail::join(directory, latest_name) << ": '" << named << "' names no checkpoint");
  });
  if (!looked.failed) {
    const std::string path = detail::join(directory, named);
    if (is_whole(path)) return path;
  } else if (!steps.empty()) {
    log(log_level::warning, looked.text, "; looking for the newest checkpoint that is whole");
  }
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (!looked.failed && step_name(*step) == named) continue;
    const std::string path = detail::join(directory, step_name(*step));
    if (!is_whole(path)) continue;
    log(log_level::warning, "going on from ", path);
    return path;
  }
  // A run that began anew would delete what may still be mended.
  TESSERA_EXPECTS_AS(checkpoint_error, passed_over.empty(),
                     "no checkpoint in " << directory << " is whole: " << passed_over);
  return std::nullopt;
}

template <host_communicator Comm>
std::optional<std::string> find_checkpoint(Comm& comm, const std::string& directory, const log_sink& log,
                                           const io_observer& observer) {
  std::string found;
  detail::together(comm, [&] {
    if (comm.rank() == 0) found = find_checkpoint(directory, log, observer).value_or("");
  });
  found = detail::broadcast_bytes(comm, found, 0);
  return found.empty() ? std::nullopt : std::optional(found);
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
