// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The seam through which every access to files goes past the user: to count, to trace, or to make it fail in a test.

#include <cstdint>
#include <functional>
#include <string_view>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// What is about to happen to a file or folder.
enum class io_kind {
  create_directory,  ///< A folder is made.
  create,            ///< A file is made, empty.
  write,             ///< Bytes are written.
  read,              ///< Bytes are read.
  sync,              ///< A file's or folder's content is brought to the disk.
  rename,            ///< A file or folder gets another name, given second.
  remove,            ///< A file, or a folder with all that is in it, is deleted.
};

/// One access.
struct io_event {
  io_kind kind;           ///< What is about to happen.
  std::string_view path;  ///< To which file or folder; for `rename`, its new name.
  std::int64_t bytes;     ///< How many bytes are written or read, else 0.
  std::int64_t offset;    ///< Where in the file, else 0.
};

/// Called before each access; empty is allowed. What it throws counts as the failure of the access. Asynchronous saves
/// call it from a background thread too, loads from all of theirs (`load_options::num_threads`), never at the same
/// time.
using io_observer = std::function<void(const io_event&)>;

}  // namespace checkpoint

TESSERA_NAMESPACE_END
