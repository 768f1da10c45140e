// Which access comes before which: an epoch for what everybody has seen, clocks for the rest.
#pragma once
#include <vector>

#include "thread.h"

struct Stamp {  // an access: thread + 1 (0 for none), when, and where in the PTX
  u32 thread = 0, epoch = 0, clock = 0, line = 0;
};
struct Cell {
  Stamp write, read, other_read, atomic;
};

// For each thread the clock below which its accesses are known. Empty: nothing is known.
using Knowledge = std::vector<u32>;

// The clocks of the threads that run together: those of a block, or of all blocks of a cluster.
struct Clocks {
  u32 count = 0, epoch = 1;
  std::vector<u32> now;     // a thread's own clock: it counts the times others have learned from it
  std::vector<u32> floors;  // clocks that the whole warp has seen
  std::vector<u32> seen;    // count x count clocks, made when a sync of some threads first needs them

  void start(u32 threads) {
    count = threads;
    epoch++;
    now.assign(count, 0);
    floors.assign(count, 0);
    seen.clear();
  }

  Stamp stamp(u32 thread, u32 line) const { return {thread + 1, epoch, now[thread], line}; }

  bool before(u32 thread, const Stamp& s) const {
    if (!s.thread || s.thread == thread + 1 || s.epoch != epoch) return true;
    const u32 other = s.thread - 1;
    if (other / 32 == thread / 32 && s.clock < floors[other]) return true;
    return !seen.empty() && s.clock < seen[(size_t)thread * count + other];
  }

  // all threads meet
  void join_all() { epoch++; }

  // all of `members` have met: each knows what the others did before, and what comes with `arriving`
  void join(const std::vector<u32>& members, const Knowledge& arriving = {}) {
    open();
    Knowledge all = arriving;
    all.resize(count, 0);
    for (u32 m : members) merge(all, &seen[(size_t)m * count]);
    for (u32 m : members) all[m] = ++now[m];
    for (u32 m : members) std::copy(all.begin(), all.end(), &seen[(size_t)m * count]);
  }

  void join_warp(const std::vector<u32>& members) {
    if (!seen.empty()) join(members);
    for (u32 m : members) floors[m] = ++now[m];
  }

  // what `thread` did so far, and what it knows, becomes part of what others will learn
  void release(u32 thread, Knowledge& into) {
    open();
    into.resize(count, 0);
    merge(into, &seen[(size_t)thread * count]);
    into[thread] = ++now[thread];
  }

  void acquire(u32 thread, const Knowledge& from) {
    if (from.empty()) return;
    open();
    u32* row = &seen[(size_t)thread * count];
    for (u32 i = 0; i < count; i++) row[i] = std::max(row[i], from[i]);
  }

  static void learn(Knowledge& into, const Knowledge& from) {
    into.resize(std::max(into.size(), from.size()), 0);
    for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
  }

 private:
  static void merge(Knowledge& into, const u32* row) {
    for (size_t i = 0; i < into.size(); i++) into[i] = std::max(into[i], row[i]);
  }

  void open() {
    if (!seen.empty()) return;
    seen.assign((size_t)count * count, 0);
    for (u32 i = 0; i < count; i++)
      for (u32 j = i & ~31u; j < std::min(count, (i & ~31u) + 32); j++) seen[(size_t)i * count + j] = floors[j];
  }
};
