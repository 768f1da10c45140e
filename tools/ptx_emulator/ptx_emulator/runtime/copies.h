// cp.async. The copy happens at the wait, the latest moment that the hardware allows.
#pragma once
#include "memory.h"

void copy_async(Thread& t, u64 to, u64 from, u32 bytes, u32 filled, u32 line, u32 site) {
  const u64 offset = to & kOffsetMask;
  log_access(t, SHARED, offset, bytes, WRITE, site);
  if (filled) log_access(t, GLOBAL, from, filled, READ, site + 1);
  shared_access(t, offset, bytes, bytes, WRITE, false, line);
  if constexpr (kCheck) mark_shared(t, offset, bytes, PENDING);
  t.engine->copies.push_back(
      {(u32)offset, from, bytes, filled, t.copy_group, t.copy_number++, line});
}

inline void copy_bytes(Thread& t, const AsyncCopy& c, u8* to) {
  u8 data[16] = {};
  if (c.filled)
    memcpy(data, global_access(t, c.from, c.filled, c.bytes, READ, false, c.line), c.filled);
  memcpy(to, data, c.bytes);
}

// Completes all copies but those of the last `groups_left` groups; -1: also uncommitted ones.
void finish_copies(Thread& t, int groups_left) {
  size_t kept = 0;
  for (AsyncCopy& c : t.engine->copies) {
    if (groups_left >= 0 && c.group >= t.copy_group - groups_left) {
      t.engine->copies[kept++] = c;
      continue;
    }
    if constexpr (kCheck) mark_shared(t, c.to, c.bytes, VALID);
    copy_bytes(t, c, shared_access(t, c.to, c.bytes, c.bytes, WRITE, false, c.line));
  }
  t.engine->copies.resize(kept);
}

// Completes the copies numbered below `end`, for an mbarrier that waits for them. They stay
// accesses at the time of their issue: the mbarrier does not order what the thread did since.
inline void complete_thread_copies(Thread& t, u32 end) {
  size_t kept = 0;
  for (AsyncCopy& c : t.engine->copies) {
    if (c.number >= end) {
      t.engine->copies[kept++] = c;
      continue;
    }
    if constexpr (kCheck) mark_shared(t, c.to, c.bytes, VALID);
    const SharedLocation location = locate_shared(t, c.to, c.bytes);
    if (location.block) copy_bytes(t, c, &t.block->cluster.shared[location.at]);
  }
  t.engine->copies.resize(kept);
}
