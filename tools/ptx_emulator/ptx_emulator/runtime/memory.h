// Loads, stores and atomics in all state spaces, and their checks.
#pragma once
#include "proxy.h"

enum ByteState : u8 { EMPTY, VALID, PENDING };

inline HIDDEN thread_local u64 dummy_memory[8];  // target of accesses outside of memory

// Reports accesses of a cell that race with this one, and records this one.
inline void check_race(Thread& t, RaceCell& cell, Access kind, bool unchanged,
                       ReportKind report_kind, u32 line, Space space, u64 offset, u32 bytes,
                       s32 argument) {
  auto check_conflict = [&](const AccessStamp& s) {
    if (t.block->cluster.clocks.is_before(s, t.self)) return false;
    report(t, report_kind, line, space, offset, bytes, argument, (s32)s.thread - 1, s.line);
    return true;
  };
  const AccessStamp now = t.block->cluster.clocks.stamp(t.self, line);
  // writing again the value that was written since the last barrier is not a race
  if (kind == WRITE && unchanged && cell.write.thread && cell.write.epoch == now.epoch) return;
  bool found = check_conflict(cell.write);
  if (kind != ATOMIC && !found) found = check_conflict(cell.atomic);
  if (kind != READ && !found) found = check_conflict(cell.read) || check_conflict(cell.other_read);
  if (kind == WRITE)
    cell.write = now;
  else if (kind == ATOMIC)
    cell.atomic = now;
  else if (cell.read.epoch != now.epoch || cell.read.thread == now.thread)
    cell.read = now;
  else
    cell.other_read = now;
}

struct SharedLocation {
  Block* block;  // null outside of shared memory
  u64 offset;    // in the block's memory
  u64 at;        // in the cluster's memory
};

inline SharedLocation locate_shared(Thread& t, u64 address, u64 bytes) {
  Cluster& c = t.block->cluster;
  const u64 named = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  const u64 rank = named ? named - 1 : t.block->rank;
  const bool inside = rank < c.blocks.size() && offset + bytes <= c.shared_bytes;
  return {inside ? &c.blocks[rank] : nullptr, offset, rank * c.shared_stride + offset};
}

inline void mark_shared(Thread& t, u64 address, u64 bytes, ByteState state) {
  const SharedLocation location = locate_shared(t, address, bytes);
  if (location.block) std::fill_n(&t.block->cluster.shared_state[location.at], bytes, state);
}

// Checks an access to shared memory; returns the host address.
inline u8* shared_access(Thread& t, u64 address, u32 bytes, u32 align, Access kind, bool unchanged,
                         u32 line) {
  Cluster& c = t.block->cluster;
  const SharedLocation location = locate_shared(t, address, bytes);
  if constexpr (kCheck) {
    if (!location.block) {
      report(t, OUT_OF_BOUNDS, line, SHARED, address, bytes);
      return (u8*)dummy_memory;
    }
    if (!location.block->alive) report(t, CLUSTER_EXIT, line, SHARED, address, bytes);
    if (location.offset % align) report(t, MISALIGNED, line, SHARED, address, bytes);
    bool empty = false, pending = false;
    for (u32 i = 0; i < bytes; i++) {
      u8& state = c.shared_state[location.at + i];
      pending |= state == PENDING;
      if (kind != WRITE)
        empty |= state == EMPTY;
      else if (state == EMPTY)
        state = VALID;
    }
    if (pending)
      report(t, MISSING_WAIT, line, SHARED, address, bytes);
    else if (empty)
      report(t, UNINITIALISED, line, SHARED, address, bytes);
    for (u64 i = c.cell(location.at); i <= c.cell(location.at + bytes - 1); i++) {
      check_race(t, c.shared_cells[i], kind, unchanged, SHARED_RACE, line, SHARED, address, bytes,
                 -1);
      if (kind != READ && t.block->worker.launch.async_proxy) note_ordinary_write(c, i);
    }
  }
  return c.shared.data() + location.at;
}

inline u8* local_access(Thread& t, u64 offset, u32 bytes, u32 align, Access kind, u32 line) {
  Worker& w = t.block->worker;
  Cluster& c = t.block->cluster;
  const u64 base = (u64)t.self * w.launch.local_bytes;
  if constexpr (kCheck) {
    if (offset + bytes > t.local_top) {
      report(t, OUT_OF_BOUNDS, line, LOCAL, offset, bytes);
      return (u8*)dummy_memory;
    }
    if (offset % align) report(t, MISALIGNED, line, LOCAL, offset, bytes);
    bool empty = false;
    for (u32 i = 0; i < bytes; i++) {
      u8& state = c.local_state[base + offset + i];
      if (kind == WRITE)
        state = VALID;
      else
        empty |= state == EMPTY;
    }
    if (empty) report(t, UNINITIALISED, line, LOCAL, offset, bytes);
  }
  if constexpr (kCount) w.totals[kind == WRITE ? T_LOCAL_WRITE : T_LOCAL_READ] += bytes;
  return c.local.data() + base + offset;
}

// Returns the index of the allocation that holds the bytes, or -1.
inline s32 find_allocation(LaunchState& launch, u64 address, u32 bytes) {
  static thread_local u32 last = 0;
  auto holds = [&](u32 i) {
    const Allocation& a = launch.allocations[i];
    const u64 offset = address - a.address;  // very large if the address lies before
    return offset < a.bytes && bytes <= a.bytes - offset;
  };
  if (last < launch.allocation_count && holds(last)) return (s32)last;
  for (u32 i = 0; i < launch.allocation_count; i++)
    if (holds(i)) return (s32)(last = i);
  return -1;
}

inline void atomic_min(std::atomic<u64>& slot, u64 key) {
  u64 seen = slot.load(std::memory_order_relaxed);
  while ((seen == 0 || key < seen) && !slot.compare_exchange_weak(seen, key)) {
  }
}
inline void atomic_max(std::atomic<u64>& slot, u64 key) {
  u64 seen = slot.load(std::memory_order_relaxed);
  while (key > seen && !slot.compare_exchange_weak(seen, key)) {
  }
}

inline u8* global_access(Thread& t, u64 address, u32 bytes, u32 align, Access kind, bool unchanged,
                         u32 line) {
  Worker& w = t.block->worker;
  LaunchState& launch = w.launch;
  if constexpr (kCheck || kCount) {
    const s32 found = find_allocation(launch, address, bytes);
    if (found < 0) {
      if constexpr (kCheck) report(t, OUT_OF_BOUNDS, line, GLOBAL, address, bytes);
      return (u8*)dummy_memory;
    }
    const Allocation& a = launch.allocations[found];
    const u64 offset = address - a.address;
    u8* written = &launch.written[found][offset];
    const bool unwritten =
        kind != WRITE && a.is_output && std::find(written, written + bytes, 0) != written + bytes;
    if (kind != READ) std::fill_n(written, bytes, 1);
    if constexpr (kCount)
      if (kind != WRITE) std::fill_n(&launch.read[found][offset], bytes, 1);
    if constexpr (kCheck) {
      if (address % align) report(t, MISALIGNED, line, GLOBAL, offset, bytes, found);
      if (unwritten) report(t, UNINITIALISED, line, GLOBAL, offset, bytes, found);
      const u64 key = ((u64)t.block->cluster.linear + 1) << 32 | line;
      for (u64 c = offset / a.granule; c <= (offset + bytes - 1) / a.granule; c++) {
        check_race(t, w.global_cells[found][c], kind, unchanged, GLOBAL_RACE, line, GLOBAL, offset,
                   bytes, found);
        atomic_min(launch.block_accesses[found][6 * c + 2 * kind], key);
        atomic_max(launch.block_accesses[found][6 * c + 2 * kind + 1], key);
      }
    }
  }
  return (u8*)address;
}

// Resolves a generic address: returns its space, and removes the space from the address.
inline Space space_of(Space space, u64& address) {
  if (space == NO_SPACE) {
    space = address >> 56 == 1 ? SHARED : address >> 56 == 2 ? LOCAL : GLOBAL;
  }
  if (space != GLOBAL) address &= kOffsetMask;
  return space;
}

// Keeps an access for the counters.
inline void log_access(Thread& t, Space space, u64 address, u32 bytes, Access kind, u32 site) {
  if constexpr (kCount) {
    if (space == LOCAL) return;
    Worker& w = t.block->worker;
    if (space == GLOBAL) w.totals[kind == READ ? T_READ_BYTES : T_WRITE_BYTES] += bytes;
    // low bits of the site: 0 shared memory, 1 global read, 2 global write
    const u32 tag = space == SHARED ? 0 : kind == READ ? 1 : 2;
    t.block->log.push_back({address, t.id, site << 2 | tag, t.engine->runs[site]++, bytes});
  }
}

inline u8* memory_access(Thread& t, Space space, u64 address, u32 bytes, u32 align, Access kind,
                         bool unchanged, u32 line) {
  if (space == SHARED) return shared_access(t, address, bytes, align, kind, unchanged, line);
  if (space == LOCAL) return local_access(t, address, bytes, align, kind, line);
  return global_access(t, address, bytes, align, kind, unchanged, line);
}

void load(Thread& t, Space space, u64 address, void* to, u32 bytes, u32 line, u32 site) {
  space = space_of(space, address);
  log_access(t, space, address, bytes, READ, site);
  memcpy(to, memory_access(t, space, address, bytes, bytes, READ, false, line), bytes);
}

// Checks if a store leaves memory unchanged.
inline bool is_unchanged(Thread& t, Space space, u64 address, const void* from, u32 bytes) {
  if (space == SHARED) {
    const SharedLocation location = locate_shared(t, address, bytes);
    return location.block && !memcmp(&t.block->cluster.shared[location.at], from, bytes);
  }
  LaunchState& launch = t.block->worker.launch;
  return space == GLOBAL && find_allocation(launch, address, bytes) >= 0 &&
         !memcmp((void*)address, from, bytes);
}

void store(Thread& t, Space space, u64 address, const void* from, u32 bytes, u32 line, u32 site) {
  space = space_of(space, address);
  log_access(t, space, address, bytes, WRITE, site);
  const bool unchanged = kCheck && is_unchanged(t, space, address, from, bytes);
  memcpy(memory_access(t, space, address, bytes, bytes, WRITE, unchanged, line), from, bytes);
}

u8* access_atomic(Thread& t, Space space, u64 address, u32 bytes, u32 line, u32 site) {
  space = space_of(space, address);
  log_access(t, space, address, bytes, ATOMIC, site);
  if constexpr (kCount) t.block->worker.totals[T_ATOMICS]++;
  return memory_access(t, space, address, bytes, bytes, ATOMIC, false, line);
}

Frame::Frame(Thread& t, u32 bytes)
    : thread(t), before(t.local_top), base((t.local_top + 15) & ~15u) {
  const u32 most = t.block->worker.launch.local_bytes;
  t.local_top = base + bytes;
  // local memory has room for one frame of each function: only recursion exceeds it
  if (t.local_top > most) stop_block(t, STACK_OVERFLOW, t.line);
  if constexpr (kCheck)
    std::fill_n(&t.block->cluster.local_state[(u64)t.self * most + base], bytes, EMPTY);
}
