// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What ThreadSanitizer is told of lanes and copies, so that it finds the races of kernels: each is a thread to it, and
// what orders them are the kernels' own barriers, flags and waits. In other builds all of this is nothing.

#if defined(__SANITIZE_THREAD__)

#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace emulated {

// Whether ThreadSanitizer watches: it takes long, and does not need many rounds.
inline constexpr bool is_watched = true;

// A sequence of accesses that ThreadSanitizer takes for a thread. It begins with what its maker knows to have happened.
class strand {
 public:
  strand() : fiber_(__tsan_create_fiber(0)), is_made_(true) {}
  strand(const strand&) = delete;
  strand& operator=(const strand&) = delete;
  ~strand() {
    if (is_made_) __tsan_destroy_fiber(fiber_);
  }
  // The one that runs.
  static strand current() { return strand(__tsan_get_current_fiber()); }
  // For `enter`: what a strand is called while another runs, which may not read its members.
  void* name() const { return fiber_; }

 private:
  explicit strand(void* fiber) : fiber_(fiber), is_made_(false) {}
  void* fiber_;
  bool is_made_;
};

// What follows is done by that strand, until another is entered in the same function: ThreadSanitizer keeps each one's
// calls and returns.
[[gnu::always_inline]] inline void enter(void* name) { __tsan_switch_to_fiber(name, __tsan_switch_to_fiber_no_sync); }

// Leaves at a place what this strand knows; another takes it up there.
[[gnu::always_inline]] inline void leave_knowledge(void* place) { __tsan_release(place); }
[[gnu::always_inline]] inline void take_knowledge(void* place) { __tsan_acquire(place); }

// In its scope the emulator works for itself, and is not watched.
class unseen {
 public:
  unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  unseen(const unseen&) = delete;
  unseen& operator=(const unseen&) = delete;
  ~unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

}  // namespace emulated

#else

namespace emulated {

inline constexpr bool is_watched = false;

struct strand {
  static strand current() { return {}; }
  void* name() const { return nullptr; }
};
inline void enter(void*) {}
inline void leave_knowledge(void*) {}
inline void take_knowledge(void*) {}
struct unseen {
  unseen() {}
  ~unseen() {}
};

}  // namespace emulated

#endif
