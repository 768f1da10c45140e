"""PTX of nvcc for sm_90: clusters, mbarriers, asynchronous copies; skipped without nvcc."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field

import numpy as np
import pytest

from ptx_emulator import Emulator, TensorMap
from ptx_text import kernel

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, not found")

SOURCE = r"""
#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda/barrier>
#include <cuda/ptx>
#include <utility>
namespace cg = cooperative_groups;
namespace ptx = cuda::ptx;
using barrier = cuda::barrier<cuda::thread_scope_block>;
// `fault` selects one of the faults that the tests expect to be reported

// every block reads the next one's shared memory
extern "C" __global__ void __cluster_dims__(4) ring(int fault, int* out) {
  __shared__ int s[64];
  cg::cluster_group c = cg::this_cluster();
  s[threadIdx.x] = 100 * blockIdx.x + threadIdx.x;
  if (fault != 1) c.sync();
  int* other = c.map_shared_rank(s, (c.block_rank() + 1) % c.num_blocks());
  out[blockIdx.x * 64 + threadIdx.x] = other[63 - threadIdx.x];
  if (fault != 2) c.sync();
}

// a histogram shared by the cluster: block r holds the bins b with b % blocks == r
extern "C" __global__ void histogram(int fault, const int* x, int n, int* bins) {
  __shared__ int s[32];
  cg::cluster_group c = cg::this_cluster();
  if (threadIdx.x < 32) s[threadIdx.x] = 0;
  if (fault != 3) c.sync();
  for (int i = c.thread_rank(); i < n; i += c.num_threads()) {
    int* home = c.map_shared_rank(s, x[i] % c.num_blocks());
    atomicAdd(&home[x[i] / c.num_blocks()], 1);
  }
  c.sync();
  if (threadIdx.x < 32) bins[threadIdx.x * c.num_blocks() + c.block_rank()] = s[threadIdx.x];
}

// block 0 writes to block 1 and arrives at its mbarrier
extern "C" __global__ void __cluster_dims__(2, 1, 1) remote(int fault, int* out) {
  __shared__ int data[32];
  __shared__ alignas(8) uint64_t ready;
  cg::cluster_group c = cg::this_cluster();
  if (threadIdx.x == 0) ptx::mbarrier_init(&ready, 32);
  c.sync();
  if (c.block_rank() == 0) {
    c.map_shared_rank(data, 1)[threadIdx.x] = 7 * threadIdx.x;
    auto* far = c.map_shared_rank(&ready, 1);
    if (fault == 4)
      ptx::mbarrier_arrive(ptx::sem_relaxed, ptx::scope_cluster,
                                 ptx::space_cluster, far);
    else
      ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cluster,
                                 ptx::space_cluster, far);
  } else {
    while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster,
                                                &ready, 0)) {}
    out[threadIdx.x] = data[31 - threadIdx.x];
  }
  c.sync();
}

// accesses between the arrival and the wait are not ordered
extern "C" __global__ void __cluster_dims__(2) apart(int fault, int* out) {
  __shared__ int s[32];
  cg::cluster_group c = cg::this_cluster();
  int* other = c.map_shared_rank(s, 1 - c.block_rank());
  if (fault != 5) s[threadIdx.x] = threadIdx.x + blockIdx.x;
  auto token = c.barrier_arrive();
  if (fault == 5) s[threadIdx.x] = threadIdx.x + blockIdx.x;
  c.barrier_wait(std::move(token));
  out[blockIdx.x * 32 + threadIdx.x] = other[threadIdx.x];
  c.sync();
}

extern "C" __global__ void __cluster_dims__(2, 2, 1) places(unsigned* out) {
  cg::cluster_group c = cg::this_cluster();
  unsigned place = c.block_rank() + 10 * c.block_index().x + 100 * c.block_index().y;
  place += 1000 * c.num_blocks() + 10000 * c.dim_blocks().y;
  unsigned cluster = ptx::get_sreg_clusterid_x() + 10 * ptx::get_sreg_clusterid_y();
  if (threadIdx.x == 0) out[blockIdx.y * gridDim.x + blockIdx.x] = place + 100000 * cluster;
}

// a tensor copy loads a tile, each thread adds to it, and a tensor copy stores it
extern "C" __global__ void tile(int fault, const __grid_constant__ CUtensorMap map, int x, int y) {
  __shared__ alignas(128) int s[8][32];
#pragma nv_diag_suppress static_var_with_dynamic_init
  __shared__ barrier bar;
  if (threadIdx.x == 0) {
    init(&bar, blockDim.x);
    ptx::fence_proxy_async(ptx::space_shared);
  }
  __syncthreads();
  barrier::arrival_token token;
  if (threadIdx.x == 0) {
    int32_t at[2] = {x, y};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, &s, &map, at,
                              cuda::device::barrier_native_handle(bar));
    token = cuda::device::barrier_arrive_tx(bar, 1, sizeof(s));
  } else {
    token = bar.arrive();
  }
  if (fault != 7) bar.wait(std::move(token));
  s[threadIdx.x / 32][threadIdx.x % 32] += threadIdx.x;
  if (fault != 6) ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t at[2] = {x, y};
    ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, at, &s);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    (&bar)->~barrier();
  }
}
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "k.cu").write_text(SOURCE)
    command = ["nvcc", "-ptx", "-std=c++17", "-lineinfo", "-arch=compute_90", "k.cu"]
    subprocess.run([*command, "-o", "k.ptx"], cwd=folder, check=True)
    return Emulator((folder / "k.ptx").read_text())


@dataclass(frozen=True)
class Case:
    """A launch; `want` is the last argument after a launch without a fault."""

    name: str
    grid: int
    threads: int
    args: tuple = ()
    size: int = 0
    want: np.ndarray = field(default_factory=lambda: np.zeros(0))
    cluster: int | None = None


T = np.arange(64)
RING = np.concatenate([100 * (b // 4 * 4 + (b + 1) % 4) + T[::-1] for b in range(8)])
NUMBERS = np.random.default_rng(0).integers(0, 64, 500).astype(np.int32)
CASES = {
    "ring": Case("ring", 8, 64, size=512, want=RING),
    "histogram": Case(
        "histogram", 2, 64, (NUMBERS, 500), 64, np.bincount(NUMBERS, minlength=64), cluster=2
    ),
    "remote": Case("remote", 2, 32, size=32, want=7 * np.arange(32)[::-1]),
    "apart": Case("apart", 2, 32, size=64, want=np.concatenate([T[:32] + 1, T[:32]])),
}


def launch(emulator: Emulator, case: Case, seed: int, fault: int = 0):
    out = np.zeros(case.size, np.int32)
    reports = emulator.launch(
        *(case.name, [fault, *case.args, out], case.grid, case.threads),
        **dict(outputs=[1 + len(case.args)], seed=seed, cluster=case.cluster),
    ).reports
    return out, reports


@needs_nvcc
@pytest.mark.parametrize("name", CASES)
def test_cluster_kernel(emulator, name):
    for seed in range(4):
        out, reports = launch(emulator, CASES[name], seed)
        assert [str(r) for r in reports] == []
        assert (out == CASES[name].want).all()


@needs_nvcc
@pytest.mark.parametrize(
    ("fault", "name", "kinds"),
    [
        (1, "ring", {"shared-race"}),  # reads before the other block has written
        (2, "ring", {"cluster-exit"}),  # leaves while the other still reads
        (3, "histogram", {"shared-race"}),  # counts before the other block has zeroed
        (4, "remote", {"shared-race"}),  # an arrival that releases nothing
        (5, "apart", {"shared-race"}),  # writes between arriving and waiting
    ],
)
def test_fault_is_reported(emulator, fault, name, kinds):
    for seed in range(3):
        _, reports = launch(emulator, CASES[name], seed, fault)
        found = {r.kind for r in reports}
        assert kinds <= found <= kinds | {"uninitialised-read"}, [str(r) for r in reports]
        # the first race of the histogram may be within a block
        assert name == "histogram" or any(r.rank is not None for r in reports)


def run_tile(emulator: Emulator, seed: int, fault: int = 0):
    x = np.arange(20 * 48, dtype=np.int32).reshape(20, 48)
    want = x.copy()
    want[4:12, 8:40] += np.arange(256).reshape(8, 32)
    args = [fault, TensorMap(x, (8, 32)), 8, 4]
    return emulator.launch("tile", args, 1, 256, seed=seed).reports, (x == want).all()


@needs_nvcc
def test_tensor_copies_that_a_barrier_waits_for(emulator):
    for seed in range(3):
        reports, right = run_tile(emulator, seed)
        assert [str(r) for r in reports] == []
        assert right
        assert "missing-fence" in {r.kind for r in run_tile(emulator, seed, fault=6)[0]}
        assert "missing-async-wait" in {r.kind for r in run_tile(emulator, seed, fault=7)[0]}


@needs_nvcc
def test_places(emulator):
    out = np.zeros(16, np.uint32)
    assert emulator.launch("places", [out], (4, 4), 32, outputs=[0]).reports == ()
    y, x = np.divmod(np.arange(16), 4)
    rank = x % 2 + 2 * (y % 2)
    cluster = x // 2 + 10 * (y // 2)
    place = rank + 10 * (x % 2) + 100 * (y % 2) + 4000 + 20000
    assert (out == place + 100000 * cluster).all()


@pytest.mark.parametrize(
    ("target", "directive", "grid", "cluster", "error"),
    [
        ("sm_80", "", 4, 2, "has 2 blocks; sm_80 allows 1"),
        ("sm_90", "", 34, 17, "cluster: sizes must be from 1 to 16"),
        ("sm_90", "", 64, (8, 4), "has 32 blocks"),
        ("sm_90", "", 3, 2, r"grid: \[3, 1, 1\] must be a multiple of the cluster \[2, 1, 1\]"),
        ("sm_90", ".explicitcluster .reqnctapercluster 2, 1, 1", 4, 4, r"k requires \(2, 1, 1\)"),
    ],
)
def test_wrong_sizes(target, directive, grid, cluster, error):
    text = kernel("", target=target).replace(")\n{", f")\n{directive}\n{{", 1)
    with pytest.raises(ValueError, match=error):
        Emulator(text).launch("k", [np.zeros(1)], grid, 1, cluster=cluster)
