// mbarrier objects: phases that end once all arrivals and all announced bytes are there. The eight
// bytes in shared memory only take part in the checks; what they stand for is kept beside it.
#pragma once
#include "copies.h"

inline Mbarrier* find_mbarrier(Thread& t, u64 address, u32 line) {
  Cluster& c = t.block->cluster;
  address &= kOffsetMask;
  const SharedPlace place = place_shared(t, address, 8);
  const auto found = place.block ? c.mbarriers.find(place.at) : c.mbarriers.end();
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
  const SharedPlace place = place_shared(t, address, 8);
  if (!place.block) return;
  Mbarrier fresh;
  fresh.expected = fresh.pending = count;
  const bool added = c.mbarriers.insert_or_assign(place.at, std::move(fresh)).second;
  if constexpr (kCheck)
    if (!added || !count) report(t, BAD_MBARRIER, line, SHARED, address, 8);
}

void mbarrier_invalidate(Thread& t, u64 address, u32 line) {
  if (!find_mbarrier(t, address, line)) return;
  address &= kOffsetMask;
  shared_access(t, address, 8, 8, WRITE, false, line);
  t.block->cluster.mbarriers.erase(place_shared(t, address, 8).at);
}

inline void complete_phase(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase++;
  m.pending = m.expected;
  if constexpr (kCheck) m.known = m.arriving;
}

// Returns the state before: the phase, and how many arrivals it still lacks.
u64 mbarrier_arrive(Thread& t, u64 address, u32 count, u32 bytes, u32 flags, u32 line) {
  Mbarrier* m = find_mbarrier(t, address, line);
  if (!m) return 0;
  const u64 state = (u64)m->phase << 32 | m->pending;
  m->bytes += bytes;
  if constexpr (kCheck) {
    if (!(flags & ARRIVE_RELAXED)) t.block->cluster.clocks.release(t.self, m->arriving);
    const bool completes = count == m->pending && !m->bytes;
    if (!count || count > m->pending || ((flags & ARRIVE_INCOMPLETE) && completes))
      report(t, BAD_MBARRIER, line, SHARED, address & kOffsetMask, 8);
  }
  m->pending -= std::min(count, m->pending);
  if (flags & ARRIVE_DROP) m->expected -= std::min(count, m->expected);
  complete_phase(*m);
  return state;
}

// expect_tx (bytes > 0) and complete_tx (bytes < 0)
void mbarrier_transaction(Thread& t, u64 address, s64 bytes, u32 line) {
  Mbarrier* m = find_mbarrier(t, address, line);
  if (!m) return;
  m->bytes += bytes;
  complete_phase(*m);
}

// What still has to land does so now, that somebody looks: the latest moment the hardware allows.
inline void land(Mbarrier& m) {
  std::vector<Landing> landings;
  landings.swap(m.landings);
  for (Landing& landing : landings) {
    if constexpr (kCheck) Clocks::learn(m.arriving, landing.known);
    if (landing.bytes) {
      Cluster& c = landing.thread->block->cluster;
      const void* from = landing.data.empty() ? (const void*)landing.from : landing.data.data();
      memcpy(&c.shared[landing.to], from, landing.bytes);
      if constexpr (kCheck) std::fill_n(&c.shared_state[landing.to], landing.bytes, VALID);
      m.bytes -= landing.bytes;
    } else {
      land_copies(*landing.thread, landing.end);
      m.pending -= m.pending > 0;
    }
    complete_phase(m);
  }
}

inline bool phase_passed(Mbarrier& m, u64 value, bool parity) {
  auto passed = [&] { return parity ? (m.phase & 1) != (value & 1) : m.phase != (u32)(value >> 32); };
  if (!passed()) land(m);
  return passed();
}

// One try: true where the phase is over. Else the others run before the thread may try again.
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
    if (m && acquires) t.block->cluster.clocks.acquire(t.self, m->known);
  return true;
}

// The mbarrier hears of all cp.async of the thread so far once they are there. Without `counted`
// the arrival is one more than it was made for.
void mbarrier_track_copies(Thread& t, u64 address, bool counted, u32 line) {
  Mbarrier* m = find_mbarrier(t, address, line);
  if (!m) return;
  if (!counted) m->pending++;
  m->landings.push_back({&t, line, t.copy_number});
  if constexpr (kCheck) t.block->cluster.clocks.release(t.self, m->landings.back().known);
}

// A block ends while copies are still on their way into its shared memory.
inline void check_landings(Thread& last) {
  Cluster& c = last.block->cluster;
  const u64 first = (u64)last.block->rank * c.shared_stride;
  for (auto& [at, m] : c.mbarriers)
    if (at >= first && at < first + c.shared_stride)
      for (Landing& landing : m.landings) report(*landing.thread, MISSING_WAIT, landing.line, SHARED, at - first, 8);
}
