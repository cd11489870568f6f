// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// POSIX files: every failure is a checkpoint_error that names the file and the system's reason.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <tessera/checkpoint/io.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

[[noreturn]] inline void fail_io(const std::string& path, const char* what, int code) {
  throw checkpoint_error(path + ": " + what + ": " + std::generic_category().message(code));
}

inline void notify(const io_observer& observer, io_kind kind, std::string_view path, std::int64_t bytes = 0,
                   std::int64_t offset = 0) {
  if (observer) observer({kind, path, bytes, offset});
}

/// An open file. Moves; closes itself.
class file {
 public:
  /// To read. @throws checkpoint_error if it cannot be opened, or is no regular file.
  static file open(const std::string& path) {
    // O_NONBLOCK: a pipe would wait for its writer
    file result(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK, "cannot be opened");
    if (!S_ISREG(result.status().st_mode)) throw checkpoint_error(path + ": this is not a regular file");
    return result;
  }
  static file create(const std::string& path, const io_observer& observer) {
    notify(observer, io_kind::create, path);
    return file(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, "cannot be created");
  }
  file() = default;
  file(file&& other) noexcept : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}
  file& operator=(file&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~file() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  bool is_open() const { return descriptor_ >= 0; }
  const std::string& path() const { return path_; }

  std::int64_t size() const { return static_cast<std::int64_t>(status().st_size); }

  void read(void* data, std::int64_t bytes, std::int64_t offset, const io_observer& observer) const {
    notify(observer, io_kind::read, path_, bytes, offset);
    for (std::int64_t done = 0; done < bytes;) {
      const ::ssize_t n = ::pread(descriptor_, static_cast<std::byte*>(data) + done,
                                  static_cast<std::size_t>(bytes - done), static_cast<::off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail_io(path_, "reading failed", errno);
      if (n == 0) {
        throw checkpoint_error(path_ + ": it ends at byte " + std::to_string(offset + done) + ", bytes up to " +
                               std::to_string(offset + bytes) + " are needed: the file is truncated");
      }
      done += n;
    }
  }

  /// Asks the system to read ahead, so that the disk works while the processor does. Only a hint.
  void start_reading(std::int64_t offset, std::int64_t bytes) const {
    (void)::posix_fadvise(descriptor_, static_cast<::off_t>(offset), static_cast<::off_t>(bytes), POSIX_FADV_WILLNEED);
  }

  void write(const void* data, std::int64_t bytes, std::int64_t offset, const io_observer& observer) const {
    notify(observer, io_kind::write, path_, bytes, offset);
    for (std::int64_t done = 0; done < bytes;) {
      const ::ssize_t n = ::pwrite(descriptor_, static_cast<const std::byte*>(data) + done,
                                   static_cast<std::size_t>(bytes - done), static_cast<::off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail_io(path_, "writing failed", errno);
      done += n;
    }
  }

  /// Asks the system to start writing what is there, so that `sync` has less to wait for. Only a hint.
  void start_writing(std::int64_t offset, std::int64_t bytes) const {
#if defined(SYNC_FILE_RANGE_WRITE)
    (void)::sync_file_range(descriptor_, offset, bytes, SYNC_FILE_RANGE_WRITE);
#else
    (void)offset;
    (void)bytes;
#endif
  }

  void sync(const io_observer& observer) const {
    notify(observer, io_kind::sync, path_);
    if (::fsync(descriptor_) != 0) fail_io(path_, "it could not be brought to the disk", errno);
  }

  /// Closes and reports what the system only says now.
  void close() {
    const int descriptor = std::exchange(descriptor_, -1);
    if (descriptor >= 0 && ::close(descriptor) != 0 && errno != EINTR) fail_io(path_, "closing failed", errno);
  }

 private:
  file(const std::string& path, int flags, const char* failure) : path_(path) {
    do {
      descriptor_ = ::open(path.c_str(), flags, 0666);
    } while (descriptor_ < 0 && errno == EINTR);
    if (descriptor_ < 0) fail_io(path, failure, errno);
  }

  struct stat status() const {
    struct stat result {};
    if (::fstat(descriptor_, &result) != 0) fail_io(path_, "its kind and size are not known", errno);
    return result;
  }

  std::string path_;
  int descriptor_ = -1;
};

inline void sync_directory(const std::string& path, const io_observer& observer) {
  notify(observer, io_kind::sync, path);
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) fail_io(path, "the folder cannot be opened", errno);
  // file systems that cannot do this for a folder say EINVAL, and need not
  const int code = ::fsync(descriptor) == 0 ? 0 : errno;
  ::close(descriptor);
  if (code != 0 && code != EINVAL) fail_io(path, "the folder could not be brought to the disk", code);
}

inline void create_directory(const std::string& path, const io_observer& observer) {
  notify(observer, io_kind::create_directory, path);
  if (::mkdir(path.c_str(), 0777) != 0) fail_io(path, "the folder cannot be made", errno);
}

inline void rename_path(const std::string& from, const std::string& to, const io_observer& observer) {
  notify(observer, io_kind::rename, to);
  if (::rename(from.c_str(), to.c_str()) != 0) fail_io(from, ("it cannot become " + to).c_str(), errno);
}

/// Two folders change their names in one step. @return False if the file system cannot.
inline bool exchange_paths(const std::string& a, const std::string& b, const io_observer& observer) {
  notify(observer, io_kind::rename, b);
#if defined(RENAME_EXCHANGE)
  if (::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0) return true;
  if (errno != EINVAL && errno != ENOSYS) fail_io(a, ("it cannot change places with " + b).c_str(), errno);
#else
  (void)a;
#endif
  return false;
}

inline void remove_tree(const std::string& path, const io_observer& observer) {
  notify(observer, io_kind::remove, path);
  std::error_code code;
  std::filesystem::remove_all(path, code);
  if (code) throw checkpoint_error(path + ": it cannot be deleted: " + code.message());
}

/// A whole file, which may not be larger than `most` bytes.
inline std::string read_text(const std::string& path, std::int64_t most, const io_observer& observer) {
  const file source = file::open(path);
  const std::int64_t bytes = source.size();
  TESSERA_EXPECTS_AS(checkpoint_error, bytes <= most,
                     path << ": it has " << bytes << " bytes, at most " << most << " are sensible");
  std::string text(static_cast<std::size_t>(bytes), '\0');
  source.read(text.data(), bytes, 0, observer);
  return text;
}

/// A new file with this content, on the disk when this returns.
inline void write_text(const std::string& path, std::string_view text, const io_observer& observer) {
  file target = file::create(path, observer);
  target.write(text.data(), static_cast<std::int64_t>(text.size()), 0, observer);
  target.sync(observer);
  target.close();
}

/// Whether a name from a file may be used as the name of a file in the same folder.
inline bool is_plain_name(std::string_view name) {
  return !name.empty() && name.front() != '.' && name.find_first_of(std::string_view("/\\\0", 3)) == name.npos;
}

inline std::string join(const std::string& folder, std::string_view name) {
  return (std::filesystem::path(folder) / name).string();
}

/// The folder that a path is in.
inline std::string parent_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
