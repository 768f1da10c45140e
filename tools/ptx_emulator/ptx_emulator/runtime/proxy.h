// The two proxies of shared memory: ordinary instructions, and the async proxy of bulk copies and
// wgmma. The async proxy sees ordinary writes only after a fence.proxy.async.
#pragma once
#include "barriers.h"

inline void note_ordinary_write(Cluster& c, u64 cell) {
  if (c.unfenced[cell]) return;
  c.unfenced[cell] = true;
  c.unfenced_cells.push_back((u32)cell);
}

// Fences the writes of the thread and those ordered before now. A fence counts once it has run,
// even if nothing orders it before the access of the async proxy.
void fence_async_proxy(Thread& t) {
  if constexpr (kCheck) {
    Cluster& c = t.block->cluster;
    size_t kept = 0;
    for (u32 i : c.unfenced_cells) {
      const RaceCell& cell = c.shared_cells[i];
      if (!c.unfenced[i]) continue;
      if (c.clocks.is_before(cell.write, t.self) && c.clocks.is_before(cell.atomic, t.self))
        c.unfenced[i] = false;
      else
        c.unfenced_cells[kept++] = i;
    }
    c.unfenced_cells.resize(kept);
  }
}

// Reports a read of the async proxy from bytes with an unfenced write. `at`: position of the bytes
// in the cluster's shared memory.
inline void check_fenced(Thread& t, u64 at, u64 address, u32 bytes, u32 line) {
  Cluster& c = t.block->cluster;
  for (u64 i = c.cell(at); i <= c.cell(at + bytes - 1); i++)
    if (c.unfenced[i]) {
      const AccessStamp& s = c.shared_cells[i].write;
      report(t, MISSING_FENCE, line, SHARED, address, bytes, -1, (s32)s.thread - 1, s.line);
      return;
    }
}

// The async proxy overwrites these bytes.
inline void clear_ordinary_writes(Cluster& c, u64 at, u32 bytes) {
  for (u64 i = c.cell(at); i <= c.cell(at + bytes - 1); i++) c.unfenced[i] = false;
}
