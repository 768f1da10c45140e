// The engine: runs a grid on the OS threads, and returns reports and counters to Python. It is
// compiled once for all kernels, which include only launch.h.
#include <thread>

#include "cluster.h"
#include "launch.h"

struct Outcome {
  std::vector<Report> reports;
  std::vector<u64> totals, executed;
  double seconds = 0;
};

#if defined(__x86_64__) && !defined(PTX_EMULATOR_PORTABLE_FIBERS)
// Saves the callee-saved registers and switches the stack. MXCSR is left: rounding modes are reset
// before a fiber switches.
asm(R"(
.text
.globl ptx_emulator_switch
.hidden ptx_emulator_switch
.type ptx_emulator_switch, @function
ptx_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

inline void run_clusters(LaunchState& launch, Worker& worker, u32 index) {
  worker.executed.assign(launch.instruction_classes, 0);
  if constexpr (kCheck)
    for (u32 i = 0; i < launch.allocation_count; i++)
      worker.global_cells.emplace_back(launch.allocations[i].bytes / launch.allocations[i].granule +
                                       1);
  Cluster cluster(worker);
  Stacks stacks(cluster.threads.size(), launch.stack_bytes);
  const u64 clusters =
      (u64)launch.grid[0] * launch.grid[1] * launch.grid[2] / launch.blocks_per_cluster();
  for (u64 i = index; i < clusters && !launch.stop; i += launch.workers)
    cluster.run(stacks, (u32)i);
}

// Finds bytes that two clusters access and at least one writes: nothing orders them within a
// launch. A cluster is reported as its first block.
inline void find_block_races(LaunchState& launch, std::vector<Report>& reports) {
  auto block_of = [](u64 key) { return (key >> 32) - 1; };
  std::map<std::pair<u32, u32>, Report> found;
  for (u32 a = 0; a < launch.allocation_count; a++) {
    auto& cells = launch.block_accesses[a];
    for (u64 c = 0; c < cells.size() / 6; c++) {
      const std::atomic<u64>* k = &cells[6 * c];
      const u64 writes[2] = {k[2 * WRITE], k[2 * WRITE + 1]};
      u64 one = 0, two = 0;
      for (u32 kind : {WRITE, READ, ATOMIC})
        for (u32 end = 0; end < 2 && !two; end++)
          for (u64 write : writes) {
            const u64 key = k[2 * kind + end];
            if (write && key && block_of(write) != block_of(key)) {
              one = write, two = key;
              break;
            }
          }
      if (!two) continue;
      const u32 linear = (u32)block_of(two);
      Report r{BLOCK_RACE,
               GLOBAL,
               (u32)two,
               (u32)one,
               {linear % launch.grid[0], linear / launch.grid[0] % launch.grid[1],
                linear / launch.grid[0] / launch.grid[1]},
               -1,
               (s32)block_of(one),
               -1,
               (s32)a,
               0,
               c * launch.allocations[a].granule,
               launch.allocations[a].granule,
               0};
      found.try_emplace({r.line, r.other_line}, r).first->second.count++;
    }
  }
  for (auto& [key, r] : found) reports.push_back(r);
}

inline Outcome* run_launch(LaunchState& launch) {
  const auto start = std::chrono::steady_clock::now();
  launch.deadline = start + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                std::chrono::duration<double>(std::min(launch.time_limit, 1e9)));
  const u32 n = launch.allocation_count;
  if (kCheck || kCount) {
    launch.written.resize(n), launch.read.resize(n);
    for (u32 i = 0; i < n; i++) {
      launch.written[i].resize(launch.allocations[i].bytes);
      if (const u8* gaps = launch.allocations[i].gaps)
        std::copy_n(gaps, launch.written[i].size(), launch.written[i].begin());
      if (kCount) launch.read[i].resize(launch.allocations[i].bytes);
      if (kCheck)
        launch.block_accesses.emplace_back(
            6 * (launch.allocations[i].bytes / launch.allocations[i].granule + 1));
    }
  }
  std::vector<std::unique_ptr<Worker>> workers;
  for (u32 i = 0; i < launch.workers; i++) workers.push_back(std::make_unique<Worker>(launch));
  std::vector<std::thread> others;
  for (u32 i = 1; i < launch.workers; i++)
    others.emplace_back([&, i] { run_clusters(launch, *workers[i], i); });
  run_clusters(launch, *workers[0], 0);
  for (std::thread& other : others) other.join();

  auto* outcome = new Outcome;
  outcome->totals.assign(T_COUNT, 0);
  outcome->executed.assign(launch.instruction_classes, 0);
  std::map<std::tuple<u32, u32, u32>, Report> merged;
  auto linear = [&](const Report& r) {
    return ((u64)r.block[2] * launch.grid[1] + r.block[1]) * launch.grid[0] + r.block[0];
  };
  for (auto& worker : workers) {
    for (auto& [key, r] : worker->reports) {
      auto [at, fresh] = merged.try_emplace(key, r);
      if (fresh) continue;
      const u64 count = at->second.count + r.count;
      if (linear(r) < linear(at->second)) at->second = r;
      at->second.count = count;
    }
    for (u32 i = 0; i < T_COUNT; i++) outcome->totals[i] += worker->totals[i];
    for (u32 i = 0; i < launch.instruction_classes; i++)
      outcome->executed[i] += worker->executed[i];
  }
  for (auto& [key, r] : merged) outcome->reports.push_back(r);
  if (kCheck) {
    find_block_races(launch, outcome->reports);
    for (u32 i = 0; i < n && !launch.stop; i++) {
      auto& written = launch.written[i];
      const u64 missing = std::count(written.begin(), written.end(), 0);
      if (launch.allocations[i].is_output && missing) {
        const u64 first = std::find(written.begin(), written.end(), 0) - written.begin();
        outcome->reports.push_back(
            {UNWRITTEN, GLOBAL, 0, 0, {0, 0, 0}, -1, -1, -1, (s32)i, 0, first, missing, 1});
      }
    }
  }
  if (kCount)
    for (u32 i = 0; i < n; i++) {
      outcome->totals[T_DISTINCT_READ] +=
          std::count(launch.read[i].begin(), launch.read[i].end(), 1);
      outcome->totals[T_DISTINCT_WRITE] +=
          std::count(launch.written[i].begin(), launch.written[i].end(), 1);
    }
  outcome->seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return outcome;
}

extern "C" {
__attribute__((used)) u32 ptx_emulator_report_count(Outcome* o) { return (u32)o->reports.size(); }
__attribute__((used)) Report* ptx_emulator_reports(Outcome* o) { return o->reports.data(); }
__attribute__((used)) u64* ptx_emulator_totals(Outcome* o) { return o->totals.data(); }
__attribute__((used)) u64* ptx_emulator_executed(Outcome* o) { return o->executed.data(); }
__attribute__((used)) double ptx_emulator_seconds(Outcome* o) { return o->seconds; }
__attribute__((used)) void ptx_emulator_free(Outcome* o) { delete o; }
}

Outcome* start_launch(const LaunchRequest& request, void (*kernel)(Thread&, u8**),
                      const KernelInfo& facts) {
  LaunchState launch;
  static_cast<KernelInfo&>(launch) = facts;
  memcpy(launch.grid, request.grid, sizeof launch.grid);
  memcpy(launch.size, request.size, sizeof launch.size);
  memcpy(launch.cluster, request.cluster, sizeof launch.cluster);
  launch.dynamic_shared = request.dynamic_shared;
  launch.workers = request.workers, launch.seed = request.seed,
  launch.time_limit = request.time_limit;
  launch.parameters = request.parameters, launch.allocations = request.allocations;
  launch.allocation_count = request.allocation_count, launch.kernel = kernel;
  return run_launch(launch);
}
