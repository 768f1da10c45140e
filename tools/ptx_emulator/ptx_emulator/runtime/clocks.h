// Order of accesses by vector clocks. An epoch stands for what every thread has seen: a barrier of
// all threads starts a new one, and vector clocks are only made when some threads synchronise.
#pragma once
#include <vector>

#include "thread.h"

// One access of a memory cell: thread + 1 (0: no access), its time, and its PTX line.
struct AccessStamp {
  u32 thread = 0, epoch = 0, clock = 0, line = 0;
};

// The accesses of a memory cell that a later access can race with.
struct RaceCell {
  AccessStamp write, read, other_read, atomic;
};

// For each thread, the clock before which its accesses are visible. Empty: none are.
using VectorClock = std::vector<u32>;

// The clocks of the threads of a cluster.
struct Clocks {
  u32 count = 0, epoch = 1;
  std::vector<u32> now;          // clock of each thread, which advances when others acquire it
  std::vector<u32> warp_clocks;  // clocks that the whole warp has seen
  std::vector<u32> vectors;  // count x count: the vector clock of each thread; empty until needed

  void start(u32 threads) {
    count = threads;
    epoch++;
    now.assign(count, 0);
    warp_clocks.assign(count, 0);
    vectors.clear();
  }

  AccessStamp stamp(u32 thread, u32 line) const { return {thread + 1, epoch, now[thread], line}; }

  // Checks if `access` is ordered before what `thread` does now.
  bool is_before(const AccessStamp& access, u32 thread) const {
    if (!access.thread || access.thread == thread + 1 || access.epoch != epoch) return true;
    const u32 other = access.thread - 1;
    if (other / 32 == thread / 32 && access.clock < warp_clocks[other]) return true;
    return !vectors.empty() && access.clock < vectors[(size_t)thread * count + other];
  }

  // All threads meet.
  void join_all() { epoch++; }

  // The members meet: each sees what the others, and the threads in `arrival_clock`, did before.
  void join(const std::vector<u32>& members, const VectorClock& arrival_clock = {}) {
    make_vectors();
    VectorClock all = arrival_clock;
    all.resize(count, 0);
    for (u32 m : members) merge(all, &vectors[(size_t)m * count]);
    for (u32 m : members) all[m] = ++now[m];
    for (u32 m : members) std::copy(all.begin(), all.end(), &vectors[(size_t)m * count]);
  }

  // All lanes of a warp meet.
  void join_warp(const std::vector<u32>& members) {
    if (!vectors.empty()) join(members);
    for (u32 m : members) warp_clocks[m] = ++now[m];
  }

  // Adds what `thread` did and saw so far to `target`.
  void release(u32 thread, VectorClock& target) {
    make_vectors();
    target.resize(count, 0);
    merge(target, &vectors[(size_t)thread * count]);
    target[thread] = ++now[thread];
  }

  // `thread` sees what was released to `source`.
  void acquire(u32 thread, const VectorClock& source) {
    if (source.empty()) return;
    make_vectors();
    u32* row = &vectors[(size_t)thread * count];
    for (u32 i = 0; i < count; i++) row[i] = std::max(row[i], source[i]);
  }

  static void merge(VectorClock& target, const VectorClock& source) {
    target.resize(std::max(target.size(), source.size()), 0);
    for (size_t i = 0; i < source.size(); i++) target[i] = std::max(target[i], source[i]);
  }

 private:
  static void merge(VectorClock& target, const u32* row) {
    for (size_t i = 0; i < target.size(); i++) target[i] = std::max(target[i], row[i]);
  }

  void make_vectors() {
    if (!vectors.empty()) return;
    vectors.assign((size_t)count * count, 0);
    for (u32 i = 0; i < count; i++)
      for (u32 j = i & ~31u; j < std::min(count, (i & ~31u) + 32); j++)
        vectors[(size_t)i * count + j] = warp_clocks[j];
  }
};
