// Barriers of a block and of a cluster, and the synchronization of warps.
#pragma once
#include "machine.h"

inline void Block::release(Barrier& barrier) {
  if (kCheck && !barrier.expected && alive < count && !barrier.waiting.empty())
    report(cluster.threads[barrier.waiting[0]], DIVERGENT_BARRIER,
           barrier.line);  // some threads have exited
  if constexpr (kCheck) {
    // at a barrier with a count, threads that have exited or only arrived see nothing of the others
    const u32 all = barrier.expected ? count * (u32)cluster.blocks.size() : cluster.alive;
    if (barrier.waiting.size() >= all)
      cluster.clocks.join_all();
    else
      cluster.clocks.join(barrier.waiting, barrier.arrival_clock);
  }
  if constexpr (kCount) {
    worker.totals[T_BARRIERS]++;
    if (barrier.waiting.size() == alive)
      flush_log();  // otherwise lanes of a warp may be at different places
  }
  for (u32 i : barrier.waiting) {
    cluster.threads[i].state = READY;
    cluster.threads[i].barrier_result = barrier.votes;
  }
  barrier = Barrier();
}

// Returns a thread that waits at the barrier with another count, at another line though the barrier
// has no count, or at another line though in the same warp. Returns -1 if there is none.
inline s32 find_divergent_thread(Thread& t, const Barrier& barrier, u32 id, u32 expected,
                                 u32 line) {
  if (barrier.waiting.empty()) return -1;
  if (barrier.expected != expected || (!expected && barrier.line != line))
    return (s32)barrier.waiting[0];
  Block& b = *t.block;
  const u32 first = t.id & ~31u;
  for (u32 i = first; i < std::min(first + 32, b.count); i++) {
    const Thread& o = b.threads[i];
    if (o.state == AT_BARRIER && o.barrier == id && o.line != line) return (s32)o.self;
  }
  return -1;
}

// `expected`: number of threads, 0 for all. `wait` is false for bar.arrive. Returns the number of
// yes votes.
u32 barrier_(Thread& t, u32 id, u32 expected, bool wait, bool vote, u32 line) {
  Block& b = *t.block;
  Barrier& barrier = b.barriers[id & 15];
  if (kCheck && wait) {
    const s32 other = find_divergent_thread(t, barrier, id, expected, line);
    if (other >= 0)
      report(t, DIVERGENT_BARRIER, line, NO_SPACE, 0, 0, -1, other, b.cluster.threads[other].line);
  }
  if (!barrier.arrived) barrier.expected = expected;
  barrier.line = line;
  barrier.arrived++;
  barrier.votes += vote;
  if (kCheck && !wait) b.cluster.clocks.release(t.self, barrier.arrival_clock);
  if (wait) {
    barrier.waiting.push_back(t.self);
    t.state = AT_BARRIER, t.line = line, t.barrier = id;
  }
  const u32 votes = barrier.votes;
  if (barrier.arrived >= (barrier.expected ? barrier.expected : b.alive)) {
    b.release(barrier);
    return votes;
  }
  if (wait) yield_(t);
  return (u32)t.barrier_result;
}

// ---- the barrier of a cluster, which has separate instructions to arrive and to wait

inline void complete_cluster_barrier(Cluster& c) {
  c.barrier.phase++;
  c.barrier.missing = c.alive;
  if constexpr (kCheck) c.barrier.phase_clock = c.barrier.arrival_clock;
  for (Thread& t : c.threads)
    if (t.state == AT_CLUSTER) t.state = READY;
}

void cluster_arrive(Thread& t, bool releases, u32 line) {
  Cluster& c = t.block->cluster;
  if (t.in_cluster_barrier) {
    if constexpr (kCheck) report(t, DIVERGENT_BARRIER, line);  // second arrival without a wait
    return;
  }
  t.in_cluster_barrier = true;
  t.cluster_phase = c.barrier.phase;
  if constexpr (kCheck)
    if (releases) c.clocks.release(t.self, c.barrier.arrival_clock);
  if (--c.barrier.missing == 0) complete_cluster_barrier(c);
}

void cluster_wait(Thread& t, u32 line) {
  Cluster& c = t.block->cluster;
  if (!t.in_cluster_barrier) {
    if constexpr (kCheck) report(t, DIVERGENT_BARRIER, line);  // wait without an arrival
    return;
  }
  if (c.barrier.phase == t.cluster_phase) {
    t.state = AT_CLUSTER, t.line = line;
    yield_(t);
  }
  t.in_cluster_barrier = false;
  if constexpr (kCheck) c.clocks.acquire(t.self, c.barrier.phase_clock);
}

// ---- warps

void complete_warp(Block& block, u32 first, u32 mask);

// Returns the mask of the lanes that have not exited.
inline u32 running_lanes(Block& b, u32 first) {
  u32 mask = 0;
  for (u32 l = 0; l < 32 && first + l < b.count; l++)
    if (b.threads[first + l].state != DONE) mask |= 1u << l;
  return mask;
}

// Completes the operation of lane `leader` if all lanes of its mask have arrived.
inline bool try_complete_warp(Block& b, u32 first, u32 leader) {
  Thread* w = &b.threads[first];
  const u32 mask = w[leader].mask & running_lanes(b, first);
  for (u32 rest = mask; rest; rest &= rest - 1) {
    Thread& o = w[__builtin_ctz(rest)];
    if (o.state != AT_WARP || o.mask != w[leader].mask || o.operation != w[leader].operation)
      return false;
  }
  // from sm_70 on, lanes may arrive at a sync from different branches
  if (kCheck && w[leader].operation != W_SYNC)
    for (u32 rest = mask; rest; rest &= rest - 1) {
      Thread& o = w[__builtin_ctz(rest)];
      if (o.line != w[leader].line) {
        report(o, WARP_MISMATCH, o.line, NO_SPACE, 0, 0, -1, (s32)w[leader].self, w[leader].line);
        break;
      }
    }
  complete_warp(b, first, mask);
  for (u32 rest = mask; rest; rest &= rest - 1) w[__builtin_ctz(rest)].state = READY;
  if (w[leader].operation == W_SYNC) {
    if constexpr (kCount) b.worker.totals[T_WARP_SYNCS]++;
    if constexpr (kCheck) {
      std::vector<u32> members;
      for (u32 rest = mask; rest; rest &= rest - 1) members.push_back(w[__builtin_ctz(rest)].self);
      if (mask == running_lanes(b, first))
        b.cluster.clocks.join_warp(members);
      else
        b.cluster.clocks.join(members);
    }
  }
  return true;
}

void warp_sync(Thread& t, u32 operation, u32 mask, u32 line) {
  Block& b = *t.block;
  const u32 first = t.id & ~31u, size = std::min(32u, b.count - first);
  mask &= size == 32 ? ~0u : (1u << size) - 1;
  if (kCheck && !(mask >> t.lane & 1)) report(t, WARP_MISMATCH, line);
  t.operation = operation, t.mask = mask | 1u << t.lane, t.line = line, t.state = AT_WARP;
  if (!try_complete_warp(b, first, t.lane)) yield_(t);
}
