// The two ways to shared memory: ordinary instructions, and the asynchronous units (matrix products,
// bulk copies). What the former wrote the latter see after a fence.proxy.async.
#pragma once
#include "barriers.h"

inline void note_ordinary_write(Cluster& c, u64 cell) {
  if (c.unfenced[cell]) return;
  c.unfenced[cell] = true;
  c.unfenced_cells.push_back((u32)cell);
}

// The thread's own writes, and those that it knows of, can now be seen. A fence that only runs at
// the right time, without a sync that orders it, passes too.
void fence_async_proxy(Thread& t) {
  if constexpr (kCheck) {
    Cluster& c = t.block->cluster;
    size_t kept = 0;
    for (u32 i : c.unfenced_cells) {
      const Cell& cell = c.shared_cells[i];
      if (!c.unfenced[i]) continue;
      if (c.clocks.before(t.self, cell.write) && c.clocks.before(t.self, cell.atomic)) c.unfenced[i] = false;
      else c.unfenced_cells[kept++] = i;
    }
    c.unfenced_cells.resize(kept);
  }
}

// `at`: in the cluster's shared memory
inline void check_fenced(Thread& t, u64 at, u64 address, u32 bytes, u32 line) {
  Cluster& c = t.block->cluster;
  for (u64 i = c.cell(at); i <= c.cell(at + bytes - 1); i++)
    if (c.unfenced[i]) {
      const Stamp& s = c.shared_cells[i].write;
      report(t, MISSING_FENCE, line, SHARED, address, bytes, -1, (s32)s.thread - 1, s.line);
      return;
    }
}

// an asynchronous unit wrote here
inline void forget_ordinary_writes(Cluster& c, u64 at, u32 bytes) {
  for (u64 i = c.cell(at); i <= c.cell(at + bytes - 1); i++) c.unfenced[i] = false;
}
