// mbarriers: a phase completes when all arrivals and all expected bytes are there. The eight bytes
// in shared memory are only used by the checks; the state is kept in `Cluster::mbarriers`.
#pragma once
#include "copies.h"

inline Mbarrier* find_mbarrier(Thread& t, u64 address, u32 line) {
  Cluster& c = t.block->cluster;
  address &= kOffsetMask;
  const SharedLocation location = locate_shared(t, address, 8);
  const auto found = location.block ? c.mbarriers.find(location.at) : c.mbarriers.end();
  if (found == c.mbarriers.end()) {
    if constexpr (kCheck) report(t, BAD_MBARRIER, line, SHARED, address, 8);
    return nullptr;
  }
  shared_access(t, address, 8, 8, ATOMIC, false, line);
  return &found->second;
}

void mbarrier_init(Thread& t, u64 address, u32 count, u32 line) {
  Cluster& c = t.block->cluster;
  address &= kOffsetMask;
  shared_access(t, address, 8, 8, WRITE, false, line);
  const SharedLocation location = locate_shared(t, address, 8);
  if (!location.block) return;
  Mbarrier fresh;
  fresh.expected = fresh.pending = count;
  const bool added = c.mbarriers.insert_or_assign(location.at, std::move(fresh)).second;
  if constexpr (kCheck)
    if (!added || !count) report(t, BAD_MBARRIER, line, SHARED, address, 8);
}

void mbarrier_invalidate(Thread& t, u64 address, u32 line) {
  if (!find_mbarrier(t, address, line)) return;
  address &= kOffsetMask;
  shared_access(t, address, 8, 8, WRITE, false, line);
  t.block->cluster.mbarriers.erase(locate_shared(t, address, 8).at);
}

inline void complete_phase(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase++;
  m.pending = m.expected;
  if constexpr (kCheck) m.phase_clock = m.arrival_clock;
}

// Returns the state before the arrival: the phase, and the number of pending arrivals.
u64 mbarrier_arrive(Thread& t, u64 address, u32 count, u32 bytes, u32 flags, u32 line) {
  Mbarrier* m = find_mbarrier(t, address, line);
  if (!m) return 0;
  const u64 state = (u64)m->phase << 32 | m->pending;
  m->bytes += bytes;
  if constexpr (kCheck) {
    if (!(flags & ARRIVE_RELAXED)) t.block->cluster.clocks.release(t.self, m->arrival_clock);
    const bool completes = count == m->pending && !m->bytes;
    if (!count || count > m->pending || ((flags & ARRIVE_INCOMPLETE) && completes))
      report(t, BAD_MBARRIER, line, SHARED, address & kOffsetMask, 8);
  }
  m->pending -= std::min(count, m->pending);
  if (flags & ARRIVE_DROP) m->expected -= std::min(count, m->expected);
  complete_phase(*m);
  return state;
}

// expect_tx (bytes > 0) or complete_tx (bytes < 0).
void mbarrier_transaction(Thread& t, u64 address, s64 bytes, u32 line) {
  Mbarrier* m = find_mbarrier(t, address, line);
  if (!m) return;
  m->bytes += bytes;
  complete_phase(*m);
}

// Completes all pending copies, now that a thread tests the mbarrier.
inline void complete_copies(Mbarrier& m) {
  std::vector<PendingCopy> pending_copies;
  pending_copies.swap(m.pending_copies);
  for (PendingCopy& pending : pending_copies) {
    if constexpr (kCheck) Clocks::merge(m.arrival_clock, pending.clock);
    if (pending.bytes) {
      Cluster& c = pending.thread->block->cluster;
      const void* from = pending.data.empty() ? (const void*)pending.from : pending.data.data();
      memcpy(&c.shared[pending.to], from, pending.bytes);
      if constexpr (kCheck) std::fill_n(&c.shared_state[pending.to], pending.bytes, VALID);
      m.bytes -= pending.bytes;
    } else {
      complete_thread_copies(*pending.thread, pending.end);
      m.pending -= m.pending > 0;
    }
    complete_phase(m);
  }
}

inline bool phase_passed(Mbarrier& m, u64 value, bool parity) {
  auto passed = [&] {
    return parity ? (m.phase & 1) != (value & 1) : m.phase != (u32)(value >> 32);
  };
  if (!passed()) complete_copies(m);
  return passed();
}

// Tests once if the phase is over. If not, the other threads run before the thread may test again.
bool mbarrier_wait(Thread& t, u64 address, u64 value, bool parity, bool acquires, u32 line) {
  Mbarrier* m = find_mbarrier(t, address, line);
  if (m && !phase_passed(*m, value, parity)) {
    t.polling = true, t.line = line;
    yield_(t);
    m = find_mbarrier(t, address, line);
    if (m && !phase_passed(*m, value, parity)) return false;
  }
  t.polling = false;
  if constexpr (kCheck)
    if (m && acquires) t.block->cluster.clocks.acquire(t.self, m->phase_clock);
  return true;
}

// Makes the mbarrier wait for all cp.asyncs of the thread so far. Without `counted` (.noinc) the
// arrival is added to the expected ones.
void mbarrier_track_copies(Thread& t, u64 address, bool counted, u32 line) {
  Mbarrier* m = find_mbarrier(t, address, line);
  if (!m) return;
  if (!counted) m->pending++;
  m->pending_copies.push_back({&t, line, t.copy_number});
  if constexpr (kCheck) t.block->cluster.clocks.release(t.self, m->pending_copies.back().clock);
}

// Reports copies to the shared memory of a block that exits before they complete.
inline void check_pending_copies(Thread& last) {
  Cluster& c = last.block->cluster;
  const u64 first = (u64)last.block->rank * c.shared_stride;
  for (auto& [at, m] : c.mbarriers)
    if (at >= first && at < first + c.shared_stride)
      for (PendingCopy& pending : m.pending_copies)
        report(*pending.thread, MISSING_WAIT, pending.line, SHARED, at - first, 8);
}
