// What a launch consists of: threads, blocks, clusters, the OS threads that run them, and reports.
#pragma once
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "clocks.h"
#include "fibers.h"

enum Access : u32 { READ, WRITE, ATOMIC };

// read from Python through ctypes: keep in step with RawReport there
struct Report {
  u32 kind, space, line, other_line;
  u32 block[3];
  s32 thread, other;  // linear thread ids in their blocks, -1 where there is none
  s32 rank;           // of the other thread's block in the cluster, -1 where it is the same block
  s32 argument;       // allocation for global accesses, else -1
  u32 unused;
  u64 offset, bytes, count;
};

struct Allocation {
  u64 address, bytes;
  u32 granule, poisoned;  // granule: bytes a race cell covers
  const u8* gaps;         // of a poisoned one: 2 for each byte between its elements; null where none
};

struct Cluster;
struct Worker;

struct AsyncCopy {
  u32 to;
  u64 from;
  u32 bytes, filled;
  int group;
  u32 number, line;
};

struct TensorMap;
// a bulk copy to global memory; it holds the data once they are read
struct BulkStore {
  u64 to, from;
  u32 bytes, group, line;
  u64 digest;  // of the source when it was issued
  std::vector<u8> data;
  const TensorMap* map = nullptr;  // where `to` is a box of a tensor, and its first element
  s32 at[5] = {};
};

// a wgmma.mma_async in flight, as one thread sees it
struct Product : ProductRequest {
  u32 group = 0, left[4] = {};
  const u32* left_registers[4] = {};
  std::vector<u32*> target;  // accumulators
  std::vector<u32> held;     // their values, once they are known
  u64 digest = 0;            // of the operands when it was issued
};

struct Own {
  Context context;
  std::vector<AsyncCopy> copies;
  std::vector<BulkStore> stores;
  std::vector<Product> products;
  std::vector<const u32*> unfenced_registers;  // written since the last wgmma.fence
  std::vector<u32> runs;                       // how often each memory site ran, when counting
};

struct Barrier {
  u32 arrived = 0, line = 0, expected = 0, votes = 0;
  std::vector<u32> waiting;  // threads of the cluster
  Knowledge arriving;        // of those that arrived and went on, as it was then
};

struct ClusterBarrier {
  u32 missing = 0;  // threads that have neither arrived nor ended
  u32 phase = 0;
  Knowledge arriving, known;
};

// Something on its way that an mbarrier waits for: the cp.async of a thread numbered below `end`, or
// a bulk copy of `bytes`.
struct Landing {
  Thread* thread;
  u32 line, end, bytes;
  u64 from, to;
  Knowledge known;       // what comes before it
  std::vector<u8> data;  // of a tensor, already gathered
};

struct Mbarrier {
  u32 expected = 0, pending = 0, phase = 0;
  s64 bytes = 0;  // announced and not yet there
  Knowledge arriving, known;
  std::vector<Landing> landings;
};

// one access of one lane, kept until all of the block meet to find what its warp did together
struct Logged {
  u64 address;
  u32 thread, site, run, bytes;
};

struct LaunchState : LaunchShape, KernelFacts {
  u64 seed;
  double time_limit;
  u32 workers;
  u8** parameters;
  u32 allocation_count;
  Allocation* allocations;
  void (*kernel)(Thread&, u8**);
  std::chrono::steady_clock::time_point deadline;
  std::atomic<bool> stop{false};
  // per allocation: bytes written (1; 2 in gaps, which nobody has to write), bytes read; and per granule six keys of
  // the clusters that touched it
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
  std::vector<std::vector<Cell>> global_cells;
  std::map<std::tuple<u32, u32, u32>, Report> reports;
  std::vector<u64> executed;
  u64 totals[T_COUNT] = {};
  explicit Worker(LaunchState& l) : launch(l) {}
};

struct Block : BlockPlace {
  Worker& worker;
  Cluster& cluster;
  u32 alive = 0;
  Thread* threads = nullptr;
  Barrier barriers[16];
  std::vector<Logged> log;
  Block(Worker& w, Cluster& c, u32 r) : BlockPlace{r}, worker(w), cluster(c) {}

  void release(Barrier& barrier);
  void flush_log();
};

enum Pass : u32 { PASS_STUCK, PASS_IDLE, PASS_WORKED };

// Blocks that run together, their threads interleaved on one OS thread; mostly a single block.
struct Cluster {
  Worker& worker;
  u32 linear = 0, alive = 0;
  u32 stride;        // thread numbers from a block to the next: whole warps
  u32 shared_bytes;  // of a block
  u32 shared_stride;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<Own> own;  // by thread
  std::vector<u8> shared, shared_state, local, local_state;
  std::vector<Cell> shared_cells;
  std::vector<u8> unfenced;  // by cell: holds what only ordinary instructions see for sure
  std::vector<u32> unfenced_cells;
  Clocks clocks;
  ClusterBarrier barrier;
  std::map<u64, Mbarrier> mbarriers;  // by place in the cluster's shared memory
  Context scheduler;
  u64 random = 0, ticks = 0;
  bool abandoned = false;

  explicit Cluster(Worker& w);
  u64 cell(u64 at) const { return at >> worker.launch.granule_bits; }
  void run(Stacks& stacks, u32 number);

 private:
  void start(Stacks& stacks, u32 number);
  void place_blocks(u32 number);
  Pass pass(const std::vector<u32>& order);
};

inline HIDDEN thread_local Thread* starting_thread;

// `other`: a thread of the cluster
inline void report(Thread& t, ReportKind kind, u32 line, Space space = NO_SPACE, u64 offset = 0,
                   u64 bytes = 0, s32 argument = -1, s32 other = -1, u32 other_line = 0) {
  Block& b = *t.block;
  s32 rank = -1;
  if (other >= 0) {
    const u32 stride = b.cluster.stride;
    if ((u32)other / stride != b.rank) rank = other / stride;
    other %= stride;
  }
  auto key = std::make_tuple((u32)kind, line, other_line);
  auto [at, fresh] = b.worker.reports.try_emplace(
      key, Report{kind, space, line, other_line, {b.x, b.y, b.z}, (s32)t.id, other, rank, argument, 0, offset, bytes, 0});
  at->second.count++;
}

void yield_(Thread& t) { switch_context(t.own->context, t.block->cluster.scheduler); }

// The kernel cannot go on: report, and never schedule these blocks again.
void stop_block(Thread& t, ReportKind kind, u32 line) {
  report(t, kind, line);
  t.block->cluster.abandoned = true;
  yield_(t);
}

// The clocks: they move on when they are read, so that launches repeat.
u64 tick(Thread& t) { return t.block->cluster.ticks += 1000; }

void spend_fuel(Thread& t, u32 line) {
  t.fuel = 4096;
  t.polling = false;
  LaunchState& launch = t.block->worker.launch;
  if (!launch.stop && std::chrono::steady_clock::now() > launch.deadline) {
    report(t, TIME_LIMIT, line);
    launch.stop = true;
  }
  if (launch.stop) {
    t.block->cluster.abandoned = true;
    t.line = line;
  }
  yield_(t);
}
