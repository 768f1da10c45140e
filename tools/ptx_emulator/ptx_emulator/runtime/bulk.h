// Bulk copies: a thread orders bytes to be moved, and an mbarrier or a group says when they are
// there. They move when somebody waits, the latest moment the hardware allows.
#pragma once
#include "mbarrier.h"

inline bool check_bulk_sizes(Thread& t, u64 to, u64 from, u32 bytes, u32 line) {
  if constexpr (kCheck)
    if (((to & kOffsetMask) | (from & kOffsetMask) | bytes) % 16) report(t, MISALIGNED, line, NO_SPACE, to, bytes);
  return bytes > 0;
}

// Claims the source at once; null outside of memory.
inline u8* bulk_source(Thread& t, Space space, u64 from, u32 bytes, u32 line) {
  u8* source = nullptr;
  if (space == GLOBAL) {
    source = global_access(t, from, bytes, 1, READ, false, line);
  } else {
    from &= kOffsetMask;
    source = shared_access(t, from, bytes, 1, READ, false, line);
    const SharedPlace place = place_shared(t, from, bytes);
    if (!place.block) return nullptr;
    if constexpr (kCheck) check_fenced(t, place.at, from, bytes, line);
  }
  return source == (u8*)spare_bytes ? nullptr : source;
}

// Claims the target now and has the bytes land once somebody waits at the mbarrier.
inline Landing* bulk_target(Thread& t, u64 to, u32 bytes, u64 barrier, u32 line) {
  Cluster& c = t.block->cluster;
  shared_access(t, to, bytes, 1, WRITE, false, line);
  Mbarrier* m = find_mbarrier(t, barrier, line);
  const SharedPlace place = place_shared(t, to, bytes);
  if (!m || !place.block) return nullptr;
  m->landings.push_back({&t, line, 0, bytes, 0, place.at});
  if constexpr (kCheck) {
    mark_shared(t, to, bytes, PENDING);
    c.clocks.release(t.self, m->landings.back().known);
  }
  if constexpr (kCheck) forget_ordinary_writes(c, place.at, bytes);
  return &m->landings.back();
}

inline void bulk_land(Thread& t, u64 to, const std::vector<u8>& data, u64 barrier, u32 line) {
  if (Landing* landing = bulk_target(t, to, (u32)data.size(), barrier, line)) landing->data = data;
}

// To shared memory, of the thread's block or another one's; the mbarrier lies in the same block.
void bulk_load(Thread& t, u64 to, Space space, u64 from, u32 bytes, u64 barrier, u32 line, u32 site) {
  if (!check_bulk_sizes(t, to, from, bytes, line)) return;
  if (space == GLOBAL) log_access(t, GLOBAL, from, bytes, READ, site);
  const u8* source = bulk_source(t, space, from, bytes, line);
  if (!source) return;
  if (Landing* landing = bulk_target(t, to & kOffsetMask, bytes, barrier, line)) landing->from = (u64)source;
}

// The same bytes to the same place in each block of the cluster whose bit is set.
void bulk_load_many(Thread& t, u64 to, u64 from, u32 bytes, u64 barrier, u32 mask, u32 line, u32 site) {
  for (u32 rank = 0; rank < t.block->cluster.blocks.size(); rank++)
    if (mask >> rank & 1)
      bulk_load(t, map_shared(to, rank), GLOBAL, from, bytes, map_shared(barrier, rank), line, site);
}

inline u64 digest_of(const u8* bytes, u32 count) {
  u64 digest = 0;
  for (u32 i = 0; i < count; i++) digest = (digest ^ bytes[i]) * 0x100000001b3ull;
  return digest;
}

void bulk_store(Thread& t, u64 to, u64 from, u32 bytes, u32 line, u32 site) {
  if (!check_bulk_sizes(t, to, from, bytes, line)) return;
  log_access(t, GLOBAL, to, bytes, WRITE, site);
  const u8* source = bulk_source(t, SHARED, from, bytes, line);
  if (source) t.own->stores.push_back({to, from & kOffsetMask, bytes, t.store_group, line, kCheck ? digest_of(source, bytes) : 0});
}

void write_tensor(Thread& t, const BulkStore& s);

// The groups but the latest `left` have read their source and, unless `only_read`, are written.
void finish_stores(Thread& t, u32 left, bool only_read) {
  size_t kept = 0;
  for (BulkStore& s : t.own->stores) {
    const bool due = s.group + left < t.store_group;
    if (due && s.data.empty()) {
      const u8* source = shared_access(t, s.from, s.bytes, 1, READ, false, s.line);
      if constexpr (kCheck)
        if (digest_of(source, s.bytes) != s.digest) report(t, MISSING_WAIT, s.line, SHARED, s.from, s.bytes);
      s.data.assign(source, source + s.bytes);
    }
    if (due && !only_read && s.map) {
      write_tensor(t, s);
    } else if (due && !only_read) {
      u8* target = global_access(t, s.to, s.bytes, 1, WRITE, false, s.line);
      if (target != (u8*)spare_bytes) memcpy(target, s.data.data(), s.bytes);
    } else {
      if (&t.own->stores[kept] != &s) t.own->stores[kept] = std::move(s);
      kept++;
    }
  }
  t.own->stores.resize(kept);
}

// A thread ends: its block's shared memory may go away before it was read.
inline void end_stores(Thread& t) {
  if constexpr (kCheck)
    for (const BulkStore& s : t.own->stores)
      if (s.data.empty()) report(t, MISSING_WAIT, s.line, SHARED, s.from, s.bytes);
  t.store_group++;
  finish_stores(t, 0, false);
}
