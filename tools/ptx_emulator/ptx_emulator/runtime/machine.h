// Data of a launch: threads, blocks, clusters, the OS threads that run them, and reports.
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
constexpr u32 kJumpsPerTurn = 4096;

// Read from Python as RawReport of reports.py.
struct Report {
  u32 kind, space, line, other_line;
  u32 block[3];
  s32 thread, other;  // ids of the threads in their blocks, or -1
  s32 rank;           // of the other thread's block in the cluster, -1: the same block
  s32 argument;       // index of the allocation, or -1
  u32 unused;
  u64 offset, bytes, count;
};

// Memory of an array argument. Written by Python as RawAllocation of arguments.py.
struct Allocation {
  u64 address, bytes;
  u32 granule;     // bytes per race cell
  u32 is_output;   // the kernel must write all bytes, and not read them before
  const u8* gaps;  // for each byte of an output 2 if it lies between the elements, else 0; or null
};

struct Cluster;
struct Worker;

// A cp.async in flight: `filled` of the bytes are read, the others are zeros.
struct AsyncCopy {
  u32 to;
  u64 from;
  u32 bytes, filled;
  int group;
  u32 number, line;
};

struct TensorMap;
// A bulk copy to global memory in flight; `data` is filled when the source is read.
struct BulkStore {
  u64 to, from;
  u32 bytes, group, line;
  u64 checksum;  // of the source when the copy was issued
  std::vector<u8> data;
  const TensorMap* map = nullptr;  // for a copy of a box of a tensor, whose first element is `at`
  s32 at[5] = {};
};

// A wgmma.mma_async in flight, for one thread.
struct Product : ProductRequest {
  u32 group = 0, left[4] = {};
  const u32* left_registers[4] = {};
  std::vector<u32*> target;  // accumulator registers
  std::vector<u32> sums;     // values to which the product adds, once they are known
  u64 checksum = 0;          // of the operands when the product was issued
};

// The part of a thread's state that translated kernels do not access.
struct EngineState {
  Context context;
  std::vector<AsyncCopy> copies;
  std::vector<BulkStore> stores;
  std::vector<Product> products;
  std::vector<const u32*> unfenced_registers;  // written since the last wgmma.fence
  std::vector<u32> runs;                       // executions of each memory access, when counting
};

struct Barrier {
  u32 arrived = 0, line = 0, expected = 0, votes = 0;
  std::vector<u32> waiting;   // threads of the cluster
  VectorClock arrival_clock;  // of threads that arrived without waiting
};

struct ClusterBarrier {
  u32 missing = 0;  // threads that have neither arrived nor ended
  u32 phase = 0;
  VectorClock arrival_clock;  // of the current phase
  VectorClock phase_clock;    // of the last completed phase
};

// Copies that an mbarrier waits for: the cp.asyncs of `thread` numbered below `end`, or, if `bytes`
// is not 0, one bulk copy.
struct PendingCopy {
  Thread* thread;
  u32 line, end, bytes;
  u64 from, to;
  VectorClock clock;     // when the copy was issued
  std::vector<u8> data;  // of a box of a tensor
};

struct Mbarrier {
  u32 expected = 0, pending = 0, phase = 0;
  s64 bytes = 0;              // expected and not yet copied
  VectorClock arrival_clock;  // of the current phase
  VectorClock phase_clock;    // of the last completed phase
  std::vector<PendingCopy> pending_copies;
};

// One access of one lane. Accesses are kept until all threads of the block meet; then those of the
// lanes of a warp at the same site are combined.
struct LoggedAccess {
  u64 address;
  u32 thread, site, run, bytes;
};

struct LaunchState : LaunchShape, KernelInfo {
  u64 seed;
  double time_limit;
  u32 workers;
  u8** parameters;
  u32 allocation_count;
  Allocation* allocations;
  void (*kernel)(Thread&, u8**);
  std::chrono::steady_clock::time_point deadline;
  std::atomic<bool> stop{false};
  // per allocation: 1 for each byte written (2 in gaps, which need not be written), and each byte
  // read
  std::vector<std::vector<u8>> written, read;
  // per allocation and race cell: the lowest and the highest key of writes, reads and atomics, in
  // the order of Access; a key is the cluster + 1 in the high word and the PTX line in the low word
  std::vector<std::vector<std::atomic<u64>>> block_accesses;
};

// In the order of TOTALS in reports.py.
enum Total : u32 {
  T_READ_BYTES,
  T_WRITE_BYTES,
  T_READ_SECTORS,
  T_WRITE_SECTORS,
  T_READ_REQUESTS,
  T_WRITE_REQUESTS,
  T_SHARED_REQUESTS,
  T_SHARED_WAVEFRONTS,
  T_SHARED_CONFLICTS,
  T_BARRIERS,
  T_WARP_SYNCS,
  T_ATOMICS,
  T_LOCAL_READ,
  T_LOCAL_WRITE,
  T_DISTINCT_READ,
  T_DISTINCT_WRITE,
  T_COUNT,
};

// One OS thread.
struct Worker {
  LaunchState& launch;
  std::vector<std::vector<RaceCell>> global_cells;
  std::map<std::tuple<u32, u32, u32>, Report> reports;
  std::vector<u64> executed;
  u64 totals[T_COUNT] = {};
  explicit Worker(LaunchState& l) : launch(l) {}
};

struct Block : BlockPosition {
  Worker& worker;
  Cluster& cluster;
  u32 alive = 0;
  Thread* threads = nullptr;
  Barrier barriers[16];
  std::vector<LoggedAccess> log;
  Block(Worker& w, Cluster& c, u32 r) : BlockPosition{r}, worker(w), cluster(c) {}

  void release(Barrier& barrier);
  void flush_log();
};

// Result of one turn of all threads: none can run, all that ran only poll mbarriers, or some
// progress.
enum Pass : u32 { PASS_STUCK, PASS_IDLE, PASS_WORKED };

// Blocks whose threads take turns on one OS thread; without clusters, a single block.
struct Cluster {
  Worker& worker;
  u32 linear = 0, alive = 0;
  u32 stride;        // thread numbers per block, a multiple of the warp size
  u32 shared_bytes;  // per block
  u32 shared_stride;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<EngineState> engine_states;  // of the threads
  std::vector<u8> shared, shared_state, local, local_state;
  std::vector<RaceCell> shared_cells;
  std::vector<u8> unfenced;  // per cell: 1 if an ordinary write was not fenced for the async proxy
  std::vector<u32> unfenced_cells;
  Clocks clocks;
  ClusterBarrier barrier;
  std::map<u64, Mbarrier> mbarriers;  // by position in the cluster's shared memory
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

// Adds a fault, or counts it if one of this kind at these lines is known. `other`: thread of the
// cluster.
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
  auto [at, fresh] = b.worker.reports.try_emplace(key, Report{kind,
                                                              space,
                                                              line,
                                                              other_line,
                                                              {b.x, b.y, b.z},
                                                              (s32)t.id,
                                                              other,
                                                              rank,
                                                              argument,
                                                              0,
                                                              offset,
                                                              bytes,
                                                              0});
  at->second.count++;
}

void yield_(Thread& t) { switch_context(t.engine->context, t.block->cluster.scheduler); }

// Reports a fault after which the cluster cannot continue.
void stop_block(Thread& t, ReportKind kind, u32 line) {
  report(t, kind, line);
  t.block->cluster.abandoned = true;
  yield_(t);
}

// %clock and %globaltimer advance when they are read, so that launches are reproducible.
u64 read_clock(Thread& t) { return t.block->cluster.ticks += 1000; }

void yield_after_jumps(Thread& t, u32 line) {
  t.jumps_left = kJumpsPerTurn;
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
