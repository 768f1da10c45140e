// Interface between a translated kernel and the engine: the state of a thread, and engine
// functions.
#pragma once
#include "numeric.h"

#ifndef PTX_EMULATOR_CHECK
#define PTX_EMULATOR_CHECK 0
#endif
#ifndef PTX_EMULATOR_COUNT
#define PTX_EMULATOR_COUNT 0
#endif
constexpr bool kCheck = PTX_EMULATOR_CHECK;
constexpr bool kCount = PTX_EMULATOR_COUNT;

// Visible to the kernel and the engine that are linked to one library, and to no other library.
#define HIDDEN __attribute__((visibility("hidden")))

// In the order of KINDS in reports.py.
enum ReportKind : u32 {
  SHARED_RACE,
  GLOBAL_RACE,
  BLOCK_RACE,
  UNINITIALISED,
  OUT_OF_BOUNDS,
  MISALIGNED,
  DIVERGENT_BARRIER,
  DEADLOCK,
  MISSING_WAIT,
  UNWRITTEN,
  TIME_LIMIT,
  TRAP,
  WARP_MISMATCH,
  STACK_OVERFLOW,
  CLUSTER_EXIT,
  BAD_MBARRIER,
  MISSING_FENCE,
  BAD_TENSOR_MAP,
};
enum Space : u32 { GLOBAL, SHARED, LOCAL, NO_SPACE };
enum WarpOperation : u32 {
  W_SYNC,
  W_UP,
  W_DOWN,
  W_BFLY,
  W_IDX,
  W_ALL,
  W_ANY,
  W_BALLOT,
  W_UNI,
  W_MATCH_ANY,
  W_MATCH_ALL,
  W_ADD,
  W_MIN,
  W_MAX,
  W_AND,
  W_OR,
  W_XOR,
  W_MIN_SIGNED,
  W_MAX_SIGNED,
  W_LDMATRIX,
  W_STMATRIX,
  W_MMA,
  W_PRODUCT,
  W_PRODUCT_WAIT,
};
enum MmaType : u32 { MMA_BF16, MMA_F16, MMA_TF32, MMA_F64, MMA_S8, MMA_U8 };
enum ArriveFlags : u32 { ARRIVE_DROP = 1, ARRIVE_RELAXED = 2, ARRIVE_INCOMPLETE = 4 };
enum ProductFlags : u32 {
  LEFT_IN_REGISTERS = 1,
  LEFT_TRANSPOSED = 2,
  RIGHT_TRANSPOSED = 4,
  LEFT_NEGATED = 8,
  RIGHT_NEGATED = 16,
  HALF_SUMS = 32,
};

// ---- the thread

struct LaunchShape {
  u32 grid[3], size[3], cluster[3], dynamic_shared;

  u32 threads_per_block() const { return size[0] * size[1] * size[2]; }
  u32 blocks_per_cluster() const { return cluster[0] * cluster[1] * cluster[2]; }
};

// Facts about a kernel, from translate.py.
struct KernelInfo {
  u32 static_shared, stack_bytes, local_bytes, access_sites, instruction_classes;
  u32 granule_bits;  // a race cell of shared memory has 2^granule_bits bytes
  bool async_proxy;  // uses bulk copies or wgmma
};

struct BlockPosition {
  u32 rank;  // in the cluster
  u32 x = 0, y = 0, z = 0, linear = 0;
  u32 count = 0;  // threads of the block
};

enum State : u8 { READY, AT_WARP, AT_BARRIER, AT_CLUSTER, DONE };
struct Block;
struct EngineState;

struct Thread {
  Block* block;
  EngineState* engine;
  const BlockPosition* position;
  const LaunchShape* launch;
  u64* executed;  // executions of each instruction class, when counting
  u32 id;         // in the block
  u32 self;       // in the cluster
  u32 lane, warp, x, y, z;
  State state;
  u32 line, mask, operation, barrier, carry, jumps_left;
  u64 in[12], out[8];  // operands and results of a warp operation
  u64 barrier_result;
  bool in_cluster_barrier;
  u32 cluster_phase;
  int copy_group;
  u32 copy_number;
  bool polling;  // its last action was an unsuccessful wait for an mbarrier
  u32 store_group, product_group;
  u32 local_top;
};

inline void count_instruction(Thread& t, u32 number) {
  if constexpr (kCount) t.executed[number]++;
}

// Called at every jump, so that endless loops let other threads run and reach the time limit.
HIDDEN void yield_after_jumps(Thread& t, u32 line);
inline void count_jump(Thread& t, u32 line) {
  if (!--t.jumps_left) yield_after_jumps(t, line);
}
HIDDEN void yield_(Thread& t);
HIDDEN void stop_block(Thread& t, ReportKind kind, u32 line);
HIDDEN u64 read_clock(Thread& t);

// ---- addresses

// The top byte of a generic address is its space; global addresses are host addresses.
constexpr u64 kSharedTag = 1ull << 56, kLocalTag = 2ull << 56, kOffsetMask = kSharedTag - 1;

// Bits 24 and up of a shared memory address are the rank of the block in the cluster + 1, or 0 for
// the thread's own block.
constexpr u32 kRankShift = 24;

// Adds an offset to an address in a register; 32-bit addresses wrap around.
template <class R>
inline u64 wrap_address(R base, s64 offset) {
  return sizeof(R) == 4 ? (u64)(u32)((u32)base + (u32)offset) : (u64)base + (u64)offset;
}

// Returns the same address in the shared memory of block `rank`; a generic address stays generic.
template <class A>
inline A map_shared(A address, u32 rank) {
  const u64 plain = (u64)address & ~((u64)0xff << kRankShift);
  return (A)(plain | (u64)(rank + 1) << kRankShift);
}

inline u32 rank_of(Thread& t, u64 address) {
  const u32 named = (u32)((address & kOffsetMask) >> kRankShift);
  return named ? named - 1 : t.position->rank;
}

// ---- memory

HIDDEN void load(Thread& t, Space space, u64 address, void* to, u32 bytes, u32 line, u32 site);
HIDDEN void store(Thread& t, Space space, u64 address, const void* from, u32 bytes, u32 line,
                  u32 site);
HIDDEN u8* access_atomic(Thread& t, Space space, u64 address, u32 bytes, u32 line, u32 site);

// Reads, changes and writes back a value; returns the old one. No other thread runs in between:
// fibers do not switch here, and kernels with global atomics use one OS thread.
template <class T, class F>
inline T atomic_(Thread& t, Space space, u64 address, F change, u32 line, u32 site) {
  u8* at = access_atomic(t, space, address, sizeof(T), line, site);
  T old;
  memcpy((void*)&old, at, sizeof old);
  const T changed = change(old);
  memcpy(at, (const void*)&changed, sizeof changed);
  return old;
}

// The frame of a function in local memory.
struct HIDDEN Frame {
  Thread& thread;
  u32 before;
  u32 base;
  Frame(Thread& t, u32 bytes);
  ~Frame() { thread.local_top = before; }
};

// ---- synchronization

HIDDEN u32 barrier_(Thread& t, u32 id, u32 expected, bool wait, bool vote, u32 line);
HIDDEN void cluster_arrive(Thread& t, bool releases, u32 line);
HIDDEN void cluster_wait(Thread& t, u32 line);
HIDDEN void warp_sync(Thread& t, u32 operation, u32 mask, u32 line);

inline u64 shuffle_(Thread& t, u32 operation, u32 value, u32 amount, u32 control, u32 mask,
                    u32 line) {
  t.in[0] = value, t.in[1] = amount, t.in[2] = control;
  warp_sync(t, operation, mask, line);
  return t.out[0];
}
inline u64 vote_(Thread& t, u32 operation, u64 value, u32 mask, u32 line) {
  t.in[0] = value;
  warp_sync(t, operation, mask, line);
  return t.out[0];
}

HIDDEN void mbarrier_init(Thread& t, u64 address, u32 count, u32 line);
HIDDEN void mbarrier_invalidate(Thread& t, u64 address, u32 line);
HIDDEN u64 mbarrier_arrive(Thread& t, u64 address, u32 count, u32 bytes, u32 flags, u32 line);
HIDDEN void mbarrier_transaction(Thread& t, u64 address, s64 bytes, u32 line);
HIDDEN bool mbarrier_wait(Thread& t, u64 address, u64 value, bool parity, bool acquires, u32 line);
HIDDEN void mbarrier_track_copies(Thread& t, u64 address, bool counted, u32 line);

// ---- asynchronous operations

// Bytes that a cp.async reads: its last operand is their number, or a predicate to read none.
template <class R>
inline u32 async_copy_bytes(u32 bytes, R operand) {
  if constexpr (std::is_same_v<R, bool>)
    return operand ? 0 : bytes;
  else
    return std::min((u32)operand, bytes);
}
HIDDEN void copy_async(Thread& t, u64 to, u64 from, u32 bytes, u32 filled, u32 line, u32 site);
HIDDEN void finish_copies(Thread& t, int groups_left);

HIDDEN void bulk_load(Thread& t, u64 to, Space space, u64 from, u32 bytes, u64 barrier, u32 line,
                      u32 site);
HIDDEN void bulk_load_multicast(Thread& t, u64 to, u64 from, u32 bytes, u64 barrier, u32 mask,
                                u32 line, u32 site);
HIDDEN void bulk_store(Thread& t, u64 to, u64 from, u32 bytes, u32 line, u32 site);
HIDDEN void finish_stores(Thread& t, u32 left, bool only_read);
HIDDEN void tensor_load(Thread& t, u64 to, u64 map_address, u32 rank, const s32* at, u64 barrier,
                        u32 mask, u32 line, u32 site);
HIDDEN void tensor_store(Thread& t, u64 map_address, u32 rank, const s32* at, u64 from, u32 line,
                         u32 site);

// A wgmma.mma_async; `flags` are ProductFlags.
struct ProductRequest {
  u32 line, type, columns, flags;
  bool adds;
  u64 a, b;  // descriptors of the operands in shared memory
};
HIDDEN void issue_product(Thread& t, const ProductRequest& request, u32* const* target, u32 count,
                          u32* const* left);
HIDDEN void wait_products(Thread& t, u32 left, u32 line);
HIDDEN void check_register(Thread& t, const u32* r, bool writes, u32 line);
HIDDEN void copy_register(Thread& t, const u32* target, const u32* source, u32 line);
HIDDEN void fence_registers(Thread& t);
HIDDEN void fence_async_proxy(Thread& t);
