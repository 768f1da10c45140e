"""PTX of Triton: results compared with float64, no reports, and reports of planted faults."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import triton

import triton_kernels as kernels
from ptx_emulator import Emulator, compile_triton, run_triton
from triton_kernels import close, random


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax(dtype):
    x, o = random(7, 300, dtype=dtype), torch.empty(7, 300, dtype=dtype)
    launch = run_triton(kernels.softmax, 7, x, o, 300, BLOCK=512, outputs=["o"], seed=1)
    assert launch.reports == ()
    close(o, x.double().softmax(1), 4)


@pytest.mark.parametrize(
    ("dtype", "precision", "block", "ulps"),
    [
        (torch.float32, "ieee", 32, 32),
        (torch.float32, "tf32", 64, 2.0**13),  # tf32 drops 13 bits of each operand
        (torch.bfloat16, "tf32", 64, 1),
    ],
)
def test_matmul(dtype, precision, block, ulps):
    a, b = random(100, 80, dtype=dtype), random(80, 72, dtype=dtype, seed=1)
    c = torch.empty(100, 72, dtype=dtype)
    grid = (triton.cdiv(100, block), triton.cdiv(72, block))
    launch = run_triton(
        *(kernels.matmul, grid, a, b, c, 100, 72, 80),
        **dict(BLOCK=block, DEPTH=32, PRECISION=precision, outputs=["c"], seed=5, count=True),
    )
    assert launch.reports == ()
    close(c, a.double() @ b.double(), ulps)
    counters = launch.counters
    assert counters.global_read_bytes == a.nbytes * grid[1] + b.nbytes * grid[0]
    assert counters.distinct_read_bytes == a.nbytes + b.nbytes
    assert counters.global_write_bytes == counters.distinct_write_bytes == c.nbytes
    if dtype == torch.bfloat16:  # four tiles of 64 x 64, three steps of 32
        assert counters.flops == {"mma.bf16": 2 * 128 * 128 * 96}


@pytest.mark.parametrize(
    ("dtype", "arch"), [(torch.float32, 80), (torch.bfloat16, 80), (torch.float16, 90)]
)
def test_attention(dtype, arch):
    q, k, v = (random(2, 70, 32, dtype=dtype, seed=i) for i in range(3))
    o = torch.empty_like(q)
    launch = run_triton(
        *(kernels.attention, (2, 2), q, k, v, o, 70, 32**-0.5),
        **dict(ROWS=64, KEYS=32, D=32, outputs=["o"], seed=2, arch=arch),
    )
    assert launch.reports == ()
    scores = (q.double() @ k.double().transpose(1, 2)) * 32**-0.5
    want = scores.softmax(2) @ v.double()
    # tf32, Triton's default, drops 13 bits of each of the four operands of two chained products
    close(o, want, 2.0**15 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("arch", [80, 90])
def test_hints_at_caches(arch):
    x, y, o = random(300, dtype=torch.float32), random(300, dtype=torch.float32), torch.empty(300)
    launch = run_triton(
        *(kernels.evicting_sum, 2, x, y, o, 300), **dict(BLOCK=256, arch=arch, outputs=["o"])
    )
    assert launch.reports == ()
    assert (o == x + y).all()


@pytest.mark.parametrize("n", [1, 16, 3])
def test_integers_are_specialised_as_at_a_launch(n):
    o = torch.zeros(1, dtype=torch.int64)
    assert run_triton(kernels.integers, 1, o, n, n, n, n, outputs=["o"]).reports == ()
    assert o.item() == 4 * n
    arguments = dict(o=o, plain=n, free=n, unaligned=n, wide=n)
    source = compile_triton(kernels.integers, arguments, 80, 4, 3).src
    one, aligned = (n == 1) * ["constexpr"] or ["i32"], {0} | ({1, 4} if n == 16 else set())
    assert list(source.signature.values()) == ["*i64", *one, "i32", *one, "i64"]
    assert {i for (i,) in source.attrs} == aligned


def test_arguments_by_name_and_missing_ones():
    x, o = random(5, 200, dtype=torch.float32), torch.empty(5)
    assert run_triton(kernels.row_mean, 5, x=x, o=o, n=200, BLOCK=256).reports == ()
    close(o, x.double().mean(1), 8)
    with pytest.raises(TypeError, match="missing a required argument: 'n'"):
        run_triton(kernels.row_mean, 5, x, o, BLOCK=256)
    with pytest.raises(TypeError, match=r"expected a triton\.jit function, got function"):
        run_triton(close, 5)
    with pytest.raises(TypeError, match="outputs: nothing are no tensor arguments"):
        run_triton(kernels.row_mean, 5, x, o, 200, BLOCK=256, outputs=["nothing"])


# instructions to remove, and what is then reported
REMOVED = {
    80: {"bar.sync": "shared-race", "cp.async.wait_group": "missing-async-wait", "nothing": None},
    90: {
        "bar.sync": "shared-race",
        "fence.proxy.async": "missing-fence",
        "wgmma.wait_group": "missing-async-wait",
        "wgmma.fence": "missing-fence",
        "nothing": None,
    },
}


@cache
def incomplete(arch: int) -> tuple[Emulator, int]:
    """Returns a pipelined matmul without each kind of synchronization, and its shared memory."""
    a, b, c = (torch.empty(1, dtype=torch.bfloat16) for _ in range(3))
    sizes = dict(M=64, N=64, K=160, BLOCK=64, DEPTH=32, PRECISION="ieee")
    compiled = compile_triton(kernels.matmul, dict(a=a, b=b, c=c, **sizes), arch, 4, 3)
    head, code = compiled.asm["ptx"].split(".visible", 1)
    code = code[: code.index("\n}") + 2]
    for i, name in enumerate(REMOVED[arch]):
        kept = [x for x in code.splitlines() if not x.strip().startswith(name)]
        assert name == "nothing" or len(kept) < len(code.splitlines())
        head += ".visible" + "\n".join(kept).replace("matmul(", f"matmul_{i}(") + "\n"
    return Emulator(head), compiled.metadata.shared


@pytest.mark.parametrize(
    ("arch", "name"), [(arch, name) for arch in REMOVED for name in REMOVED[arch]]
)
def test_a_matmul_without_synchronization_is_reported(arch, name):
    emulator, shared = incomplete(arch)
    a, b = random(64, 160, dtype=torch.bfloat16), random(160, 64, dtype=torch.bfloat16, seed=1)
    c = torch.empty(64, 64, dtype=torch.bfloat16)
    reports = emulator.launch(
        *(f"matmul_{list(REMOVED[arch]).index(name)}", [a, b, c, 64, 64, 160, None, None], 1, 128),
        **dict(shared_bytes=shared, outputs=[2]),
    ).reports
    kind = REMOVED[arch][name]
    assert (kind in {r.kind for r in reports}) if kind else reports == ()
