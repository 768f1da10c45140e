"""PTX of nvcc for sm_80: memory spaces, calls, structs, source lines; skipped without nvcc."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from ptx_emulator import Emulator

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, not found")

SOURCE = r"""
#include <cuda_bf16.h>
struct Weights { float values[4]; int count; };
__device__ float totals[4];
__constant__ float scale[3] = {1, 2, 3};
__device__ __noinline__ float weigh(float x, const float* p) { return x * p[1]; }

template <bool SYNC>
__device__ void reverse(float* a) {
  __shared__ float s[128];
  s[threadIdx.x] = a[threadIdx.x];
  if (SYNC) __syncthreads();
  a[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void reversed(float* a) { reverse<true>(a); }
extern "C" __global__ void unordered(float* a) { reverse<false>(a); }

extern "C" __global__ void mixed(float* out, Weights w, int i, const __nv_bfloat16* b, double d) {
  extern __shared__ float dynamic[];
  float local[8];
  for (int j = 0; j < 8; j++) local[j] = threadIdx.x * j;
  dynamic[threadIdx.x] = scale[i] + threadIdx.x;
  __syncthreads();
  float x = weigh(w.values[i] + local[w.count + i], dynamic) + __bfloat162float(b[threadIdx.x]);
  out[threadIdx.x] = x + (float)d;
  atomicAdd(&totals[threadIdx.x & 3], 1.f);
  __syncthreads();
  if (threadIdx.x < 4) out[blockDim.x + threadIdx.x] = totals[threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "k.cu").write_text(SOURCE)
    command = ["nvcc", "-ptx", "-lineinfo", "-arch=compute_80", "k.cu", "-o", "k.ptx"]
    subprocess.run(command, cwd=folder, check=True)
    return Emulator((folder / "k.ptx").read_text())


def test_barrier(emulator):
    a = np.arange(128, dtype=np.float32)
    assert emulator.launch("reversed", [a], 1, 128, seed=1).reports == ()
    assert (a == np.arange(128)[::-1]).all()


def test_missing_barrier_is_reported_with_its_source_line(emulator):
    a = np.arange(128, dtype=np.float32)
    reports = emulator.launch("unordered", [a], 1, 128, seed=1).reports
    races = [r for r in reports if r.kind == "shared-race"]
    line = next(i for i, x in enumerate(SOURCE.splitlines(), 1) if "s[127" in x)
    assert any(f"k.cu:{line}" in r.source + r.other_source for r in races)
    assert all(len(r.threads) == 2 and r.block == (0, 0, 0) for r in races)


def test_structs_calls_constants_local_and_dynamic_memory(emulator):
    weights = np.array([0.5, 1.5, 2.5, 3.5], np.float32).tobytes() + np.int32(2).tobytes()
    b = (np.arange(64, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    out = np.zeros(68, np.float32)
    launch = emulator.launch(
        "mixed", [out, weights, 1, b, 0.25], 1, 64, shared_bytes=256, outputs=[0], seed=4
    )
    assert launch.reports == ()
    t = np.arange(64)
    assert (out[:64] == (1.5 + 3 * t) * 3 + t + 0.25).all()
    assert (out[64:] == 16).all()
