// Threads, warps and blocks: scheduling, barriers, and which access comes before which.
#pragma once
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "fibers.h"
#include "numeric.h"

#ifndef FEATKD_CHECK
#define FEATKD_CHECK 0
#endif
#ifndef FEATKD_COUNT
#define FEATKD_COUNT 0
#endif
constexpr bool kCheck = FEATKD_CHECK;
constexpr bool kCount = FEATKD_COUNT;

// the order is that of KINDS in featkd/ptx/reports.py
enum ReportKind : u32 {
  SHARED_RACE, GLOBAL_RACE, BLOCK_RACE, UNINITIALISED, OUT_OF_BOUNDS, MISALIGNED,
  DIVERGENT_BARRIER, DEADLOCK, MISSING_WAIT, UNWRITTEN, TIME_LIMIT, TRAP, WARP_MISMATCH, STACK_OVERFLOW,
};
enum Space : u32 { GLOBAL, SHARED, LOCAL, NO_SPACE };
enum Access : u32 { READ, WRITE, ATOMIC };

// read from Python through ctypes: keep in step with RawReport there
struct Report {
  u32 kind, space, line, other_line;
  u32 block[3];
  s32 thread, other;  // linear thread ids, -1 where there is none
  s32 argument;       // allocation for global accesses, else -1
  u64 offset, bytes, count;
};

struct Allocation {
  u64 address, bytes;
  u32 granule, poisoned;  // granule: bytes a race cell covers
};

struct Stamp {  // an access: thread + 1 (0 for none), when, and where in the PTX
  u32 thread = 0, epoch = 0, clock = 0, line = 0;
};
struct Cell {
  Stamp write, read, other_read, atomic;
};

enum State : u8 { READY, AT_WARP, AT_BARRIER, DONE };
struct Block;
struct Worker;

struct AsyncCopy {
  u32 to;
  u64 from;
  u32 bytes, filled;
  int group;
  u32 line, site;
};

struct Thread {
  Context context;
  Block* block;
  u32 id, lane, warp, x, y, z;
  State state;
  u32 line, mask, operation, barrier, carry, fuel, clock;
  u64 in[12], out[8];
  u64 barrier_result;
  std::vector<AsyncCopy> copies;
  int copy_group;
  u32 local_top;
  std::vector<u32> runs;  // how often each memory site ran, when counting
};

struct Barrier {
  u32 arrived = 0, line = 0, expected = 0, votes = 0;
  std::vector<u32> waiting, joined;
};

// one access of one lane, kept until the block's next barrier to find what its warp did together
struct Logged {
  u64 address;
  u32 warp, site, run, bytes;
};

struct LaunchState {
  u32 grid[3], size[3], dynamic_shared, static_shared;
  u64 seed;
  double time_limit;
  u32 workers;
  u8** parameters;
  u32 allocation_count;
  Allocation* allocations;
  void (*kernel)(Thread&, u8**);
  u32 stack_bytes, local_bytes, sites, classes;
  std::chrono::steady_clock::time_point deadline;
  std::atomic<bool> stop{false};
  // per allocation: bytes written (poisoned or counted), bytes read; and per granule six block keys
  std::vector<std::vector<u8>> written, read;
  std::vector<std::vector<std::atomic<u64>>> touched;
};

enum Total : u32 {
  T_READ_BYTES, T_WRITE_BYTES, T_READ_SECTORS, T_WRITE_SECTORS, T_READ_REQUESTS, T_WRITE_REQUESTS,
  T_SHARED_REQUESTS, T_SHARED_WAVEFRONTS, T_SHARED_CONFLICTS, T_BARRIERS, T_WARP_SYNCS, T_ATOMICS,
  T_LOCAL_READ, T_LOCAL_WRITE, T_DISTINCT_READ, T_DISTINCT_WRITE, T_COUNT,
};

struct Worker {
  LaunchState& launch;
  std::vector<u8> shared, shared_state, local, local_state;
  std::vector<Cell> shared_cells;
  std::vector<std::vector<Cell>> global_cells;
  std::map<std::tuple<u32, u32, u32>, Report> reports;
  std::vector<u64> executed;
  u64 totals[T_COUNT] = {};
  std::vector<Logged> log;
  u32 epoch = 1;
  explicit Worker(LaunchState& l) : launch(l) {}
  void flush_log();
};

struct Block {
  Worker& worker;
  u32 x, y, z, linear, count, alive;
  std::vector<Thread> threads;
  std::vector<u32> floors;  // clocks that the whole warp has seen
  std::vector<u32> seen;    // count x count clocks, made when a partial sync first needs them
  Barrier barriers[16];
  Context scheduler;
  Thread* running = nullptr;
  u64 random;
  bool abandoned = false;
  explicit Block(Worker& w) : worker(w) {}

  void run(Stacks& stacks);
  void release(Barrier& barrier);
};

static thread_local Thread* starting_thread;

inline void report(Thread& t, ReportKind kind, u32 line, Space space = NO_SPACE, u64 offset = 0,
                   u64 bytes = 0, s32 argument = -1, s32 other = -1, u32 other_line = 0) {
  Block& b = *t.block;
  auto key = std::make_tuple((u32)kind, line, other_line);
  auto [at, fresh] = b.worker.reports.try_emplace(
      key, Report{kind, space, line, other_line, {b.x, b.y, b.z}, (s32)t.id, other, argument, offset, bytes, 0});
  at->second.count++;
}

inline void yield_(Thread& t) { switch_context(t.context, t.block->scheduler); }

// The kernel cannot go on: report, and never schedule this block again.
inline void stop_block(Thread& t, ReportKind kind, u32 line) {
  report(t, kind, line);
  t.block->abandoned = true;
  yield_(t);
}

// Called at every jump: a loop that never ends lets others run, and meets the time limit.
inline void spend(Thread& t, u32 line) {
  if (--t.fuel) return;
  t.fuel = 4096;
  LaunchState& launch = t.block->worker.launch;
  if (!launch.stop && std::chrono::steady_clock::now() > launch.deadline) {
    report(t, TIME_LIMIT, line);
    launch.stop = true;
  }
  if (launch.stop) {
    t.block->abandoned = true;
    t.line = line;
  }
  yield_(t);
}

// ---- happens-before

inline bool before(Thread& t, const Stamp& s) {
  if (!s.thread || s.thread == t.id + 1) return true;
  Block& b = *t.block;
  const u32 other = s.thread - 1;
  if (s.epoch != b.worker.epoch || other >= b.count) return true;
  if (other / 32 == t.warp && s.clock < b.floors[other]) return true;
  return !b.seen.empty() && s.clock < b.seen[(size_t)t.id * b.count + other];
}

// all of `members` have met; those of `learners` now know what every member did before
inline void join(Block& b, const std::vector<u32>& members, const std::vector<u32>& learners) {
  if (!kCheck) return;
  if (b.seen.empty()) {
    b.seen.assign((size_t)b.count * b.count, 0);
    for (u32 i = 0; i < b.count; i++)
      for (u32 j = i & ~31u; j < std::min(b.count, (i & ~31u) + 32); j++)
        b.seen[(size_t)i * b.count + j] = b.floors[j];
  }
  std::vector<u32> all(b.count, 0);
  for (u32 m : members) {
    const u32* row = &b.seen[(size_t)m * b.count];
    for (u32 j = 0; j < b.count; j++) all[j] = std::max(all[j], row[j]);
  }
  for (u32 m : members) all[m] = ++b.threads[m].clock;
  for (u32 m : learners) std::copy(all.begin(), all.end(), &b.seen[(size_t)m * b.count]);
}

// ---- barriers

inline void Block::release(Barrier& barrier) {
  if (kCheck && !barrier.expected && alive < count && !barrier.waiting.empty())
    report(threads[barrier.waiting[0]], DIVERGENT_BARRIER, barrier.line);  // some have left
  if (barrier.joined.size() >= alive) worker.epoch++;
  else join(*this, barrier.joined, barrier.waiting);
  if (kCount) {
    worker.totals[T_BARRIERS]++;
    worker.flush_log();
  }
  for (u32 i : barrier.waiting) {
    threads[i].state = READY;
    threads[i].barrier_result = barrier.votes;
  }
  barrier = Barrier();
}

// The thread that arrived before this one at another line or with another count, if that is wrong:
// lanes of a warp must meet a barrier together, and so must all threads where none are counted.
inline s32 differs(Thread& t, const Barrier& barrier, u32 id, u32 expected, u32 line) {
  if (barrier.waiting.empty()) return -1;
  if (barrier.expected != expected || (!expected && barrier.line != line)) return (s32)barrier.waiting[0];
  Block& b = *t.block;
  const u32 first = t.id & ~31u;
  for (u32 i = first; i < std::min(first + 32, b.count); i++) {
    const Thread& o = b.threads[i];
    if (o.state == AT_BARRIER && o.barrier == id && o.line != line) return (s32)i;
  }
  return -1;
}

// `expected` 0: all threads. wait false: bar.arrive. Returns how many threads voted yes.
inline u32 barrier_(Thread& t, u32 id, u32 expected, bool wait, bool vote, u32 line) {
  Block& b = *t.block;
  Barrier& barrier = b.barriers[id & 15];
  if (kCheck && wait) {
    const s32 other = differs(t, barrier, id, expected, line);
    if (other >= 0) report(t, DIVERGENT_BARRIER, line, NO_SPACE, 0, 0, -1, other, b.threads[other].line);
  }
  if (!barrier.arrived) barrier.expected = expected;
  barrier.line = line;
  barrier.arrived++;
  barrier.votes += vote;
  barrier.joined.push_back(t.id);
  if (wait) {
    barrier.waiting.push_back(t.id);
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

// ---- warps

enum WarpOperation : u32 {
  W_SYNC, W_UP, W_DOWN, W_BFLY, W_IDX, W_ALL, W_ANY, W_BALLOT, W_UNI, W_MATCH_ANY, W_MATCH_ALL,
  W_ADD, W_MIN, W_MAX, W_AND, W_OR, W_XOR, W_MIN_SIGNED, W_MAX_SIGNED, W_LDMATRIX, W_STMATRIX, W_MMA,
};
void complete_warp(Block& block, u32 first, u32 mask);

inline u32 living(Block& b, u32 first) {
  u32 mask = 0;
  for (u32 l = 0; l < 32 && first + l < b.count; l++)
    if (b.threads[first + l].state != DONE) mask |= 1u << l;
  return mask;
}

// completes the operation that lane `leader` waits at, once all lanes it names are there
inline bool try_complete(Block& b, u32 first, u32 leader) {
  Thread* w = &b.threads[first];
  const u32 mask = w[leader].mask & living(b, first);
  for (u32 rest = mask; rest; rest &= rest - 1) {
    Thread& o = w[__builtin_ctz(rest)];
    if (o.state != AT_WARP || o.mask != w[leader].mask || o.operation != w[leader].operation) return false;
  }
  if (kCheck)
    for (u32 rest = mask; rest; rest &= rest - 1) {
      Thread& o = w[__builtin_ctz(rest)];
      if (o.line != w[leader].line) {
        report(o, WARP_MISMATCH, o.line, NO_SPACE, 0, 0, -1, (s32)w[leader].id, w[leader].line);
        break;
      }
    }
  complete_warp(b, first, mask);
  for (u32 rest = mask; rest; rest &= rest - 1) w[__builtin_ctz(rest)].state = READY;
  if (w[leader].operation == W_SYNC) {
    if (kCount) b.worker.totals[T_WARP_SYNCS]++;
    if (kCheck) {
      std::vector<u32> members;
      for (u32 rest = mask; rest; rest &= rest - 1) members.push_back(first + __builtin_ctz(rest));
      if (mask == living(b, first)) {
        if (!b.seen.empty()) join(b, members, members);
        for (u32 m : members) b.floors[m] = ++b.threads[m].clock;
      } else {
        join(b, members, members);
      }
    }
  }
  return true;
}

inline void warp_sync(Thread& t, u32 operation, u32 mask, u32 line) {
  Block& b = *t.block;
  const u32 first = t.id & ~31u, size = std::min(32u, b.count - first);
  mask &= size == 32 ? ~0u : (1u << size) - 1;
  if (kCheck && !(mask >> t.lane & 1)) report(t, WARP_MISMATCH, line);
  t.operation = operation, t.mask = mask | 1u << t.lane, t.line = line, t.state = AT_WARP;
  if (!try_complete(b, first, t.lane)) yield_(t);
}

// ---- the life of a block

void finish_copies(Thread& t, int groups_left);

inline void thread_main() {
  Thread& t = *starting_thread;
  Block& b = *t.block;
  b.worker.launch.kernel(t, b.worker.launch.parameters);
  finish_copies(t, -1);
  t.state = DONE;
  b.alive--;
  for (Barrier& barrier : b.barriers)
    if (barrier.arrived && !barrier.expected && barrier.arrived >= b.alive) b.release(barrier);
  const u32 first = t.id & ~31u;
  for (u32 rest = living(b, first); rest; rest &= rest - 1) {
    const u32 lane = __builtin_ctz(rest);
    if (b.threads[first + lane].state == AT_WARP && try_complete(b, first, lane)) break;
  }
  yield_(t);
  abort();  // a finished thread is never scheduled again
}

inline u64 next_random(u64& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

inline void Block::run(Stacks& stacks) {
  LaunchState& launch = worker.launch;
  count = alive = launch.size[0] * launch.size[1] * launch.size[2];
  threads.resize(count);
  floors.assign(count, 0);
  seen.clear();
  abandoned = false;
  for (Barrier& barrier : barriers) barrier = Barrier();
  worker.epoch++;
  std::fill(worker.shared.begin(), worker.shared.end(), 0xff);
  if (kCheck) {
    std::fill(worker.shared_state.begin(), worker.shared_state.end(), 0);
    std::fill(worker.local_state.begin(), worker.local_state.end(), 0);
  }
  random = (launch.seed + 1) * 0x9e3779b97f4a7c15ull ^ ((u64)linear + 1) * 0xbf58476d1ce4e5b9ull;
  if (!random) random = 1;
  std::vector<u32> order(count);
  for (u32 i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.block = this;
    t.id = order[i] = i, t.lane = i & 31, t.warp = i / 32;
    t.x = i % launch.size[0], t.y = i / launch.size[0] % launch.size[1];
    t.z = i / launch.size[0] / launch.size[1];
    t.state = READY, t.fuel = 4096, t.clock = 0, t.carry = 0, t.line = 0;
    t.copies.clear(), t.copy_group = 0, t.local_top = 0;
    if (kCount) t.runs.assign(launch.sites, 0);
    t.context.start(stacks[i], stacks.bytes(), thread_main);
  }
  while (alive && !abandoned) {
    if (launch.seed)
      for (u32 i = count - 1; i; i--) std::swap(order[i], order[next_random(random) % (i + 1)]);
    bool ran = false;
    for (u32 i : order) {
      Thread& t = threads[i];
      if (t.state != READY) continue;
      ran = true;
      running = starting_thread = &t;
      switch_context(scheduler, t.context);
      if (abandoned) break;
    }
    if (!ran) {
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
  if (kCount) worker.flush_log();
}
