// Execution of a cluster: its blocks start, their threads take turns, the last one exits.
#pragma once
#include "counters.h"
#include "mbarrier.h"
#include "warp.h"

// The last thread of a block exits: accesses of other blocks to its shared memory must be ordered
// before.
inline void check_exit(Thread& last) {
  Block& b = *last.block;
  Cluster& c = b.cluster;
  const u64 first = c.cell((u64)b.rank * c.shared_stride),
            granule = 1ull << c.worker.launch.granule_bits;
  for (u64 i = 0; i < c.cell(c.shared_stride); i++) {
    const RaceCell& cell = c.shared_cells[first + i];
    for (const AccessStamp& s : {cell.write, cell.read, cell.other_read, cell.atomic}) {
      if (!s.thread || (s.thread - 1) / c.stride == b.rank) continue;
      bool ordered = false;
      for (u32 t = 0; t < b.count && !ordered; t++)
        ordered = c.clocks.is_before(s, b.threads[t].self);
      if (ordered) continue;
      report(last, CLUSTER_EXIT, s.line, SHARED, i * granule, granule, -1, (s32)s.thread - 1,
             s.line);
    }
  }
}

inline void end_thread(Thread& t) {
  Block& b = *t.block;
  Cluster& c = b.cluster;
  t.state = DONE;
  b.alive--, c.alive--;
  for (Barrier& barrier : b.barriers)
    if (barrier.arrived && !barrier.expected && barrier.arrived >= b.alive) b.release(barrier);
  const u32 first = t.id & ~31u;
  for (u32 rest = running_lanes(b, first); rest; rest &= rest - 1) {
    const u32 lane = __builtin_ctz(rest);
    if (b.threads[first + lane].state == AT_WARP && try_complete_warp(b, first, lane)) break;
  }
  const bool arrived = t.in_cluster_barrier && t.cluster_phase == c.barrier.phase;
  if (!arrived && --c.barrier.missing == 0) complete_cluster_barrier(c);
  if constexpr (kCheck)
    if (!b.alive) {
      check_pending_copies(t);
      if (c.blocks.size() > 1) check_exit(t);
    }
}

inline void thread_main() {
  Thread& t = *starting_thread;
  LaunchState& launch = t.block->worker.launch;
  launch.kernel(t, launch.parameters);
  finish_copies(t, -1);
  check_products(t);
  end_stores(t);
  end_thread(t);
  yield_(t);
  abort();  // never reached: a finished thread is not scheduled
}

inline u64 next_random(u64& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

inline Cluster::Cluster(Worker& w) : worker(w) {
  LaunchState& launch = w.launch;
  const u32 size = launch.blocks_per_cluster();
  // without a cluster no padding is needed
  stride = size == 1 ? launch.threads_per_block() : (launch.threads_per_block() + 31) & ~31u;
  shared_bytes = launch.static_shared + launch.dynamic_shared;
  shared_stride = (shared_bytes + 15) & ~15u;
  blocks.reserve(size);
  for (u32 rank = 0; rank < size; rank++) blocks.emplace_back(w, *this, rank);
  threads.resize((size_t)size * stride);
  engine_states.resize(threads.size());
  shared.resize((size_t)size * shared_stride);
  local.resize(threads.size() * launch.local_bytes);
  if constexpr (kCheck) {
    shared_state.resize(shared.size());
    local_state.resize(local.size());
    shared_cells.resize(cell(shared.size()) + 1);
    unfenced.resize(shared_cells.size());
  }
}

inline void Cluster::place_blocks(u32 number) {
  LaunchState& launch = worker.launch;
  u32 at[3];
  for (u32 i = 0, rest = number; i < 3; i++) {
    const u32 clusters = launch.grid[i] / launch.cluster[i];
    at[i] = rest % clusters * launch.cluster[i];
    rest /= clusters;
  }
  for (Block& b : blocks) {
    b.x = at[0] + b.rank % launch.cluster[0];
    b.y = at[1] + b.rank / launch.cluster[0] % launch.cluster[1];
    b.z = at[2] + b.rank / launch.cluster[0] / launch.cluster[1];
    b.linear = (b.z * launch.grid[1] + b.y) * launch.grid[0] + b.x;
  }
  linear = blocks[0].linear;
}

inline void Cluster::start(Stacks& stacks, u32 number) {
  LaunchState& launch = worker.launch;
  const u32 count = launch.threads_per_block();
  alive = 0;
  ticks = 0;
  abandoned = false;
  clocks.start((u32)threads.size());
  std::fill(shared.begin(), shared.end(), 0xff);
  if constexpr (kCheck) {
    std::fill(shared_state.begin(), shared_state.end(), 0);
    std::fill(local_state.begin(), local_state.end(), 0);
    std::fill(unfenced.begin(), unfenced.end(), 0);
    unfenced_cells.clear();
  }
  place_blocks(number);
  for (Block& b : blocks) {
    b.count = b.alive = count;
    alive += count;
    b.threads = &threads[(size_t)b.rank * stride];
    for (Barrier& one : b.barriers) one = Barrier();
    for (u32 i = 0; i < stride; i++) {
      Thread& t = b.threads[i];
      t.block = &b, t.position = &b, t.launch = &launch,
      t.engine = &engine_states[b.rank * stride + i];
      t.executed = worker.executed.data();
      t.id = i, t.self = b.rank * stride + i, t.lane = i & 31, t.warp = i / 32;
      t.x = i % launch.size[0], t.y = i / launch.size[0] % launch.size[1];
      t.z = i / launch.size[0] / launch.size[1];
      t.state = i < count ? READY : DONE, t.jumps_left = kJumpsPerTurn, t.carry = 0, t.line = 0;
      t.engine->copies.clear(), t.copy_group = 0, t.copy_number = 0, t.local_top = 0;
      t.engine->stores.clear(), t.store_group = 0, t.engine->products.clear(), t.product_group = 0,
                                t.engine->unfenced_registers.clear();
      t.polling = t.in_cluster_barrier = false;
      if constexpr (kCount) t.engine->runs.assign(launch.access_sites, 0);
      if (i < count) t.engine->context.start(stacks[t.self], stacks.bytes(), thread_main);
    }
  }
  mbarriers.clear();
  barrier = ClusterBarrier();
  barrier.missing = alive;
}

// Runs each ready thread until it waits. The turn is idle if all threads that ran have polled an
// mbarrier in vain, now and the turn before.
inline Pass Cluster::pass(const std::vector<u32>& order) {
  Pass result = PASS_STUCK;
  for (u32 i : order) {
    Thread& t = threads[i];
    if (t.state != READY) continue;
    const bool polled = t.polling;
    starting_thread = &t;
    switch_context(scheduler, t.engine->context);
    const bool idle = polled && t.polling && t.state == READY;
    result = idle ? std::max(result, PASS_IDLE) : PASS_WORKED;
    if (abandoned) break;
  }
  return result;
}

inline void Cluster::run(Stacks& stacks, u32 number) {
  // polling loops may give up by themselves after some tries
  constexpr u32 kIdlePasses = 2000;
  LaunchState& launch = worker.launch;
  start(stacks, number);
  random = (launch.seed + 1) * 0x9e3779b97f4a7c15ull ^ ((u64)linear + 1) * 0xbf58476d1ce4e5b9ull;
  if (!random) random = 1;
  std::vector<u32> order(threads.size());
  for (u32 i = 0; i < order.size(); i++) order[i] = i;
  u32 idle = 0;
  while (alive && !abandoned) {
    if (launch.seed)
      for (u32 i = (u32)order.size() - 1; i; i--)
        std::swap(order[i], order[next_random(random) % (i + 1)]);
    const Pass passed = pass(order);
    idle = passed == PASS_IDLE ? idle + 1 : 0;
    if (passed == PASS_STUCK || idle > kIdlePasses) {
      for (Thread& t : threads)
        if (t.state != DONE) report(t, DEADLOCK, t.line);
      break;
    }
    if (std::chrono::steady_clock::now() > launch.deadline && alive && !abandoned) {
      for (Thread& t : threads)
        if (t.state != DONE) {
          report(t, TIME_LIMIT, t.line);
          break;
        }
      launch.stop = abandoned = true;
    }
  }
  if constexpr (kCount)
    for (Block& b : blocks) b.flush_log();
}
