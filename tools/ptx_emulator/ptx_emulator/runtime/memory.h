// The memory spaces: loads, stores, atomics, and what is checked.
#pragma once
#include "proxy.h"

enum ByteState : u8 { EMPTY, VALID, PENDING };

inline HIDDEN thread_local u64 spare_bytes[8];  // where accesses outside of memory go

inline void race(Thread& t, Cell& cell, Access kind, bool same, ReportKind report_kind, u32 line,
                 Space space, u64 offset, u32 bytes, s32 argument) {
  auto meets = [&](const Stamp& s) {
    if (t.block->cluster.clocks.before(t.self, s)) return false;
    report(t, report_kind, line, space, offset, bytes, argument, (s32)s.thread - 1, s.line);
    return true;
  };
  const Stamp now = t.block->cluster.clocks.stamp(t.self, line);
  // writing the value already written since the last barrier changes nothing for anybody
  if (kind == WRITE && same && cell.write.thread && cell.write.epoch == now.epoch) return;
  bool found = meets(cell.write);
  if (kind != ATOMIC && !found) found = meets(cell.atomic);
  if (kind != READ && !found) found = meets(cell.read) || meets(cell.other_read);
  if (kind == WRITE) cell.write = now;
  else if (kind == ATOMIC) cell.atomic = now;
  else if (cell.read.epoch != now.epoch || cell.read.thread == now.thread) cell.read = now;
  else cell.other_read = now;
}

struct SharedPlace {
  Block* block;  // null outside of every block
  u64 offset;    // in that block's memory
  u64 at;        // in the cluster's
};

inline SharedPlace place_shared(Thread& t, u64 address, u64 bytes) {
  Cluster& c = t.block->cluster;
  const u64 named = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  const u64 rank = named ? named - 1 : t.block->rank;
  const bool inside = rank < c.blocks.size() && offset + bytes <= c.shared_bytes;
  return {inside ? &c.blocks[rank] : nullptr, offset, rank * c.shared_stride + offset};
}

inline void mark_shared(Thread& t, u64 address, u64 bytes, ByteState state) {
  const SharedPlace place = place_shared(t, address, bytes);
  if (place.block) std::fill_n(&t.block->cluster.shared_state[place.at], bytes, state);
}

// Claims `bytes` of shared memory from `address` on for an access; returns their host address.
inline u8* shared_access(Thread& t, u64 address, u32 bytes, u32 align, Access kind, bool same, u32 line) {
  Cluster& c = t.block->cluster;
  const SharedPlace place = place_shared(t, address, bytes);
  if constexpr (kCheck) {
    if (!place.block) {
      report(t, OUT_OF_BOUNDS, line, SHARED, address, bytes);
      return (u8*)spare_bytes;
    }
    if (!place.block->alive) report(t, CLUSTER_EXIT, line, SHARED, address, bytes);
    if (place.offset % align) report(t, MISALIGNED, line, SHARED, address, bytes);
    bool empty = false, pending = false;
    for (u32 i = 0; i < bytes; i++) {
      u8& state = c.shared_state[place.at + i];
      pending |= state == PENDING;
      if (kind != WRITE) empty |= state == EMPTY;
      else if (state == EMPTY) state = VALID;
    }
    if (pending) report(t, MISSING_WAIT, line, SHARED, address, bytes);
    else if (empty) report(t, UNINITIALISED, line, SHARED, address, bytes);
    for (u64 i = c.cell(place.at); i <= c.cell(place.at + bytes - 1); i++) {
      race(t, c.shared_cells[i], kind, same, SHARED_RACE, line, SHARED, address, bytes, -1);
      if (kind != READ && t.block->worker.launch.async_proxy) note_ordinary_write(c, i);
    }
  }
  return c.shared.data() + place.at;
}

inline u8* local_access(Thread& t, u64 offset, u32 bytes, u32 align, Access kind, u32 line) {
  Worker& w = t.block->worker;
  Cluster& c = t.block->cluster;
  const u64 base = (u64)t.self * w.launch.local_bytes;
  if constexpr (kCheck) {
    if (offset + bytes > t.local_top) {
      report(t, OUT_OF_BOUNDS, line, LOCAL, offset, bytes);
      return (u8*)spare_bytes;
    }
    if (offset % align) report(t, MISALIGNED, line, LOCAL, offset, bytes);
    bool empty = false;
    for (u32 i = 0; i < bytes; i++) {
      u8& state = c.local_state[base + offset + i];
      if (kind == WRITE) state = VALID;
      else empty |= state == EMPTY;
    }
    if (empty) report(t, UNINITIALISED, line, LOCAL, offset, bytes);
  }
  if constexpr (kCount) w.totals[kind == WRITE ? T_LOCAL_WRITE : T_LOCAL_READ] += bytes;
  return c.local.data() + base + offset;
}

inline s32 find_allocation(LaunchState& launch, u64 address, u32 bytes) {
  static thread_local u32 last = 0;
  auto holds = [&](u32 i) {
    const Allocation& a = launch.allocations[i];
    const u64 offset = address - a.address;  // huge where the address lies before
    return offset < a.bytes && bytes <= a.bytes - offset;
  };
  if (last < launch.allocation_count && holds(last)) return (s32)last;
  for (u32 i = 0; i < launch.allocation_count; i++)
    if (holds(i)) return (s32)(last = i);
  return -1;
}

inline void lower(std::atomic<u64>& slot, u64 key) {
  u64 seen = slot.load(std::memory_order_relaxed);
  while ((seen == 0 || key < seen) && !slot.compare_exchange_weak(seen, key)) {}
}
inline void raise(std::atomic<u64>& slot, u64 key) {
  u64 seen = slot.load(std::memory_order_relaxed);
  while (key > seen && !slot.compare_exchange_weak(seen, key)) {}
}

inline u8* global_access(Thread& t, u64 address, u32 bytes, u32 align, Access kind, bool same, u32 line) {
  Worker& w = t.block->worker;
  LaunchState& launch = w.launch;
  if constexpr (kCheck || kCount) {
    const s32 found = find_allocation(launch, address, bytes);
    if (found < 0) {
      if constexpr (kCheck) report(t, OUT_OF_BOUNDS, line, GLOBAL, address, bytes);
      return (u8*)spare_bytes;
    }
    const Allocation& a = launch.allocations[found];
    const u64 offset = address - a.address;
    u8* written = &launch.written[found][offset];
    const bool unwritten = kind != WRITE && a.poisoned && std::find(written, written + bytes, 0) != written + bytes;
    if (kind != READ) std::fill_n(written, bytes, 1);
    if constexpr (kCount)
      if (kind != WRITE) std::fill_n(&launch.read[found][offset], bytes, 1);
    if constexpr (kCheck) {
      if (address % align) report(t, MISALIGNED, line, GLOBAL, offset, bytes, found);
      if (unwritten) report(t, UNINITIALISED, line, GLOBAL, offset, bytes, found);
      const u64 key = ((u64)t.block->cluster.linear + 1) << 32 | line;
      for (u64 c = offset / a.granule; c <= (offset + bytes - 1) / a.granule; c++) {
        race(t, w.global_cells[found][c], kind, same, GLOBAL_RACE, line, GLOBAL, offset, bytes, found);
        lower(launch.touched[found][6 * c + 2 * kind], key);
        raise(launch.touched[found][6 * c + 2 * kind + 1], key);
      }
    }
  }
  return (u8*)address;
}

inline Space space_of(Space space, u64& address) {
  if (space == NO_SPACE) {
    space = address >> 56 == 1 ? SHARED : address >> 56 == 2 ? LOCAL : GLOBAL;
  }
  if (space != GLOBAL) address &= kOffsetMask;
  return space;
}

inline void log_access(Thread& t, Space space, u64 address, u32 bytes, Access kind, u32 site) {
  if constexpr (kCount) {
    if (space == LOCAL) return;
    Worker& w = t.block->worker;
    if (space == GLOBAL) w.totals[kind == READ ? T_READ_BYTES : T_WRITE_BYTES] += bytes;
    // the site's low bits say what it is: 0 shared, 1 global read, 2 global write
    const u32 tag = space == SHARED ? 0 : kind == READ ? 1 : 2;
    t.block->log.push_back({address, t.id, site << 2 | tag, t.own->runs[site]++, bytes});
  }
}

inline u8* claim(Thread& t, Space space, u64 address, u32 bytes, u32 align, Access kind, bool same, u32 line) {
  if (space == SHARED) return shared_access(t, address, bytes, align, kind, same, line);
  if (space == LOCAL) return local_access(t, address, bytes, align, kind, line);
  return global_access(t, address, bytes, align, kind, same, line);
}

void load(Thread& t, Space space, u64 address, void* to, u32 bytes, u32 line, u32 site) {
  space = space_of(space, address);
  log_access(t, space, address, bytes, READ, site);
  memcpy(to, claim(t, space, address, bytes, bytes, READ, false, line), bytes);
}

// would the store change memory? only asked when checking, and only of memory that is there
inline bool holds_already(Thread& t, Space space, u64 address, const void* from, u32 bytes) {
  if (space == SHARED) {
    const SharedPlace place = place_shared(t, address, bytes);
    return place.block && !memcmp(&t.block->cluster.shared[place.at], from, bytes);
  }
  LaunchState& launch = t.block->worker.launch;
  return space == GLOBAL && find_allocation(launch, address, bytes) >= 0 && !memcmp((void*)address, from, bytes);
}

void store(Thread& t, Space space, u64 address, const void* from, u32 bytes, u32 line, u32 site) {
  space = space_of(space, address);
  log_access(t, space, address, bytes, WRITE, site);
  const bool same = kCheck && holds_already(t, space, address, from, bytes);
  memcpy(claim(t, space, address, bytes, bytes, WRITE, same, line), from, bytes);
}

u8* claim_atomic(Thread& t, Space space, u64 address, u32 bytes, u32 line, u32 site) {
  space = space_of(space, address);
  log_access(t, space, address, bytes, ATOMIC, site);
  if constexpr (kCount) t.block->worker.totals[T_ATOMICS]++;
  return claim(t, space, address, bytes, bytes, ATOMIC, false, line);
}

Frame::Frame(Thread& t, u32 bytes) : thread(t), before(t.local_top), base((t.local_top + 15) & ~15u) {
  const u32 most = t.block->worker.launch.local_bytes;
  t.local_top = base + bytes;
  // sized by the translator for every function once: only recursion gets past it
  if (t.local_top > most) stop_block(t, STACK_OVERFLOW, t.line);
  if constexpr (kCheck) std::fill_n(&t.block->cluster.local_state[(u64)t.self * most + base], bytes, EMPTY);
}
