// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The copy engine of a multiprocessor, which does what lanes ask of it at once or as late as their waits allow, so that
// a wait that is missing or too short shows as wrong rows. Each copy is a strand: it knows what the lane knew that
// asked for it, and a lane knows what it has done after waiting for it.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
#include <utility>
#include <vector>

#include "emulated/races.hpp"

namespace emulated {

// Done by `by`, which leaves what it knows then at `place`. Arguments are values, so that nothing of the emulator's is
// read on the way.
inline void copy_as(void* by, void* self, void* place, void* to, const void* from, std::size_t bytes) {
  enter(by);
  std::memcpy(to, from, bytes);
  leave_knowledge(place);
  enter(self);
}

// `by` knows from now on what `self` knows.
inline void hand_over(void* self, void* by, void* place) {
  leave_knowledge(place);
  enter(by);
  take_knowledge(place);
  enter(self);
}

// Strands for the copies of one lane; one whose copy is over does another.
class copy_strands {
 public:
  strand* begin(const strand& self) {
    if (idle_.empty()) idle_.push_back(&all_.emplace_back());
    strand* const by = idle_.back();
    idle_.pop_back();
    hand_over(self.name(), by->name(), by);
    return by;
  }
  void end(strand* by) { idle_.push_back(by); }

 private:
  std::deque<strand> all_;
  std::vector<strand*> idle_;
};

// From shared to global memory.
struct store {
  unsigned char* to;
  const unsigned char* from;
  std::size_t bytes;
  strand* by;
  std::vector<unsigned char> data = {};  // as it was when the copy engine read it
  bool is_read = false, is_written = false;

  void read(const strand& self) {
    if (is_read) return;
    is_read = true;
    data.resize(bytes);
    copy_as(by->name(), self.name(), by, data.data(), from, bytes);
  }
  void write(const strand& self) {
    read(self);
    if (is_written) return;
    is_written = true;
    copy_as(by->name(), self.name(), by, to, data.data(), bytes);
  }
};

// Of one lane, committed in groups.
class lane_stores {
 public:
  void add(store s) { open_.push_back(std::move(s)); }
  void commit() { groups_.push_back(std::exchange(open_, {})); }
  // Until at most `pending` groups have not been read.
  void wait_read(std::size_t pending, const strand& self) {
    for (std::size_t g = 0; g + pending < groups_.size(); ++g) {
      for (store& s : groups_[g]) {
        s.read(self);
        take_knowledge(s.by);
      }
    }
  }
  // Until at most `pending` groups have not been written.
  void wait_written(std::size_t pending, const strand& self, copy_strands& strands) {
    for (; groups_.size() > pending; groups_.pop_front()) {
      for (store& s : groups_.front()) {
        s.write(self);
        take_knowledge(s.by);
        strands.end(s.by);
      }
    }
  }

 private:
  std::vector<store> open_;
  std::deque<std::vector<store>> groups_;  // the oldest first
};

// From global to shared memory.
struct load {
  unsigned char* to;
  const void* from;
  std::size_t bytes;
  strand* by;
  copy_strands* of;
};

// A barrier in shared memory that one lane arms for a phase, and that loads complete.
class transaction_barrier {
 public:
  // @return whether the phase before is over.
  bool arm(std::uint32_t bytes) {
    if (expected_ != 0) return false;
    expected_ = bytes;
    arrived_ = 0;
    return true;
  }
  void add(const load& l) { loads_.push_back(l); }
  void complete(const load& l, const strand& self) {
    copy_as(l.by->name(), self.name(), places_ + (phase_ & 1), l.to, l.from, l.bytes);
    l.of->end(l.by);
    arrived_ += static_cast<std::uint32_t>(l.bytes);
  }
  // Whether the phase of this parity is over; then this lane knows its loads.
  bool look(std::uint32_t parity, const strand& self) {
    for (const load& l : std::exchange(loads_, {})) complete(l, self);
    if (expected_ != 0 && arrived_ == expected_) {
      ++phase_;
      expected_ = 0;
    }
    if ((phase_ & 1) == parity) return false;
    take_knowledge(places_ + parity);
    return true;
  }

 private:
  std::uint64_t phase_ = 0;
  std::uint32_t expected_ = 0, arrived_ = 0;
  std::vector<load> loads_;  // not done yet
  char places_[2] = {};      // of what is known after an even and an odd phase
};

}  // namespace emulated
