"""PTX of Triton for sm_90: matrix products of warpgroups, copies by tensor maps."""

from __future__ import annotations

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import triton_kernels as kernels
from ptx_emulator import run_triton
from triton_kernels import close, random


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmul(dtype):
    a, b = random(100, 80, dtype=dtype), random(80, 72, dtype=dtype, seed=1)
    c = torch.empty(100, 72, dtype=dtype)
    launch = run_triton(
        *(kernels.matmul, (2, 2), a, b, c, 100, 72, 80),
        **dict(BLOCK=64, DEPTH=32, PRECISION="tf32", outputs=["c"], seed=5, arch=90, count=True),
    )
    assert [str(r) for r in launch.reports] == []
    kind = "tf32" if dtype == torch.float32 else "bf16"
    # four tiles of 64 x 64, three steps of 32
    assert launch.counters.flops == {f"wgmma.{kind}": 2 * 128 * 128 * 96}
    close(c, a.double() @ b.double(), 2.0**13 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("stages", [1, 3])
def test_matmul_by_tensor_descriptors(stages):
    a, b = random(100, 80, dtype=torch.bfloat16), random(80, 72, dtype=torch.bfloat16, seed=1)
    c = torch.empty(100, 72, dtype=torch.bfloat16)
    described = (
        TensorDescriptor.from_tensor(x, block)
        for x, block in ((a, [64, 32]), (b, [32, 64]), (c, [64, 64]))
    )
    launch = run_triton(
        *(kernels.descriptor_matmul, (2, 2), *described, 80),
        **dict(BLOCK=64, DEPTH=32, outputs=["c"], seed=5, arch=90, num_stages=stages),
    )
    assert [str(r) for r in launch.reports] == []
    close(c, a.double() @ b.double(), 1)
