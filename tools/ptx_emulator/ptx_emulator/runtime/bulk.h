// Bulk copies, which complete on an mbarrier or as a group. The copy happens at the wait, the
// latest moment that the hardware allows.
#pragma once
#include "mbarrier.h"

inline bool check_bulk_sizes(Thread& t, u64 to, u64 from, u32 bytes, u32 line) {
  if constexpr (kCheck)
    if (((to & kOffsetMask) | (from & kOffsetMask) | bytes) % 16)
      report(t, MISALIGNED, line, NO_SPACE, to, bytes);
  return bytes > 0;
}

// Checks the access to the source when the copy is issued; returns null outside of memory.
inline u8* bulk_source(Thread& t, Space space, u64 from, u32 bytes, u32 line) {
  u8* source = nullptr;
  if (space == GLOBAL) {
    source = global_access(t, from, bytes, 1, READ, false, line);
  } else {
    from &= kOffsetMask;
    source = shared_access(t, from, bytes, 1, READ, false, line);
    const SharedLocation location = locate_shared(t, from, bytes);
    if (!location.block) return nullptr;
    if constexpr (kCheck) check_fenced(t, location.at, from, bytes, line);
  }
  return source == (u8*)dummy_memory ? nullptr : source;
}

// Checks the access to the target when the copy is issued, and makes the mbarrier wait for the
// copy.
inline PendingCopy* start_bulk_copy(Thread& t, u64 to, u32 bytes, u64 barrier, u32 line) {
  Cluster& c = t.block->cluster;
  shared_access(t, to, bytes, 1, WRITE, false, line);
  Mbarrier* m = find_mbarrier(t, barrier, line);
  const SharedLocation location = locate_shared(t, to, bytes);
  if (!m || !location.block) return nullptr;
  m->pending_copies.push_back({&t, line, 0, bytes, 0, location.at});
  if constexpr (kCheck) {
    mark_shared(t, to, bytes, PENDING);
    c.clocks.release(t.self, m->pending_copies.back().clock);
  }
  if constexpr (kCheck) clear_ordinary_writes(c, location.at, bytes);
  return &m->pending_copies.back();
}

inline void start_tensor_copy(Thread& t, u64 to, const std::vector<u8>& data, u64 barrier,
                              u32 line) {
  if (PendingCopy* pending = start_bulk_copy(t, to, (u32)data.size(), barrier, line))
    pending->data = data;
}

// Copies to the shared memory of any block of the cluster; the mbarrier lies in the same block.
void bulk_load(Thread& t, u64 to, Space space, u64 from, u32 bytes, u64 barrier, u32 line,
               u32 site) {
  if (!check_bulk_sizes(t, to, from, bytes, line)) return;
  if (space == GLOBAL) log_access(t, GLOBAL, from, bytes, READ, site);
  const u8* source = bulk_source(t, space, from, bytes, line);
  if (!source) return;
  if (PendingCopy* pending = start_bulk_copy(t, to & kOffsetMask, bytes, barrier, line))
    pending->from = (u64)source;
}

// Copies the same bytes to the same address in each block of the cluster whose bit is set.
void bulk_load_multicast(Thread& t, u64 to, u64 from, u32 bytes, u64 barrier, u32 mask, u32 line,
                         u32 site) {
  for (u32 rank = 0; rank < t.block->cluster.blocks.size(); rank++)
    if (mask >> rank & 1)
      bulk_load(t, map_shared(to, rank), GLOBAL, from, bytes, map_shared(barrier, rank), line,
                site);
}

inline u64 checksum_of(const u8* bytes, u32 count) {
  u64 checksum = 0;
  for (u32 i = 0; i < count; i++) checksum = (checksum ^ bytes[i]) * 0x100000001b3ull;
  return checksum;
}

void bulk_store(Thread& t, u64 to, u64 from, u32 bytes, u32 line, u32 site) {
  if (!check_bulk_sizes(t, to, from, bytes, line)) return;
  log_access(t, GLOBAL, to, bytes, WRITE, site);
  const u8* source = bulk_source(t, SHARED, from, bytes, line);
  if (source)
    t.engine->stores.push_back({to, from & kOffsetMask, bytes, t.store_group, line,
                                kCheck ? checksum_of(source, bytes) : 0});
}

void write_tensor(Thread& t, const BulkStore& s);

// Waits for all groups but the latest `left`: reads their sources and, unless `only_read`, writes
// them.
void finish_stores(Thread& t, u32 left, bool only_read) {
  size_t kept = 0;
  for (BulkStore& s : t.engine->stores) {
    const bool due = s.group + left < t.store_group;
    if (due && s.data.empty()) {
      const u8* source = shared_access(t, s.from, s.bytes, 1, READ, false, s.line);
      if constexpr (kCheck)
        if (checksum_of(source, s.bytes) != s.checksum)
          report(t, MISSING_WAIT, s.line, SHARED, s.from, s.bytes);
      s.data.assign(source, source + s.bytes);
    }
    if (due && !only_read && s.map) {
      write_tensor(t, s);
    } else if (due && !only_read) {
      u8* target = global_access(t, s.to, s.bytes, 1, WRITE, false, s.line);
      if (target != (u8*)dummy_memory) memcpy(target, s.data.data(), s.bytes);
    } else {
      if (&t.engine->stores[kept] != &s) t.engine->stores[kept] = std::move(s);
      kept++;
    }
  }
  t.engine->stores.resize(kept);
}

// A thread exits: sources that were not read are reported, as the block's shared memory may vanish.
inline void end_stores(Thread& t) {
  if constexpr (kCheck)
    for (const BulkStore& s : t.engine->stores)
      if (s.data.empty()) report(t, MISSING_WAIT, s.line, SHARED, s.from, s.bytes);
  t.store_group++;
  finish_stores(t, 0, false);
}
