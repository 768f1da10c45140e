"""PTX of Triton for sm_80: results compared with float64, and no reports."""

from __future__ import annotations

import pytest
import torch
import triton

import triton_kernels as kernels
from ptx_emulator import Emulator, compile_triton, run_triton
from triton_kernels import close, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_row_mean():
    x, o = random(5, 200, dtype=torch.float32), torch.empty(5)
    launch = run_triton(kernels.row_mean, 5, x, o, 200, BLOCK=256, outputs=["o"], seed=3)
    assert launch.reports == ()
    close(o, x.double().mean(1), 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(dtype):
    x, o = random(7, 300, dtype=dtype), torch.empty(7, 300, dtype=dtype)
    launch = run_triton(kernels.softmax, 7, x, o, 300, BLOCK=512, outputs=["o"], seed=1)
    assert launch.reports == ()
    close(o, x.double().softmax(1), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    x, o = random(6, 384, dtype=dtype), torch.empty(6, 384, dtype=dtype)
    w, b = random(384, dtype=dtype, seed=1), random(384, dtype=dtype, seed=2)
    launch = run_triton(kernels.layer_norm, 6, x, w, b, o, 384, 1e-5, BLOCK=512, outputs=["o"])
    assert launch.reports == ()
    want = torch.nn.functional.layer_norm(x.double(), (384,), w.double(), b.double(), 1e-5)
    close(o, want, 4)


@pytest.mark.parametrize(
    ("dtype", "precision", "block", "ulps"),
    [
        (torch.float32, "ieee", 32, 32),
        (torch.float32, "tf32", 64, 2.0**13),  # tf32 drops 13 bits of each operand
        (torch.float16, "tf32", 64, 1),
        (torch.bfloat16, "tf32", 64, 1),
    ],
)
def test_matmul(dtype, precision, block, ulps):
    a, b = random(100, 80, dtype=dtype), random(80, 72, dtype=dtype, seed=1)
    c = torch.empty(100, 72, dtype=dtype)
    grid = (triton.cdiv(100, block), triton.cdiv(72, block))
    launch = run_triton(
        *(kernels.matmul, grid, a, b, c, 100, 72, 80),
        **dict(BLOCK=block, DEPTH=32, PRECISION=precision, outputs=["c"], seed=5),
    )
    assert launch.reports == ()
    close(c, a.double() @ b.double(), ulps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype):
    q, k, v = (random(2, 70, 32, dtype=dtype, seed=i) for i in range(3))
    o = torch.empty_like(q)
    launch = run_triton(
        *(kernels.attention, (2, 2), q, k, v, o, 70, 32**-0.5),
        **dict(ROWS=64, KEYS=32, D=32, outputs=["o"], seed=2),
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
    with pytest.raises(TypeError, match="missing a required argument: 'n'"):
        run_triton(kernels.row_mean, 5, x, o, BLOCK=256)
    with pytest.raises(TypeError, match=r"expected a triton\.jit function, got function"):
        run_triton(close, 5)
    with pytest.raises(TypeError, match="outputs: nothing are no tensor arguments"):
        run_triton(kernels.row_mean, 5, x, o, 200, BLOCK=256, outputs=["nothing"])


@pytest.mark.parametrize(
    ("removed", "kind"),
    [("bar.sync", "shared-race"), ("cp.async.wait_group", "missing-async-wait"), (None, None)],
)
def test_a_pipelined_matmul_without_its_barriers_or_waits_is_reported(removed, kind):
    a, b = random(64, 160, dtype=torch.bfloat16), random(160, 64, dtype=torch.bfloat16, seed=1)
    c = torch.empty(64, 64, dtype=torch.bfloat16)
    sizes = dict(M=64, N=64, K=160, BLOCK=64, DEPTH=32, PRECISION="ieee")
    compiled = compile_triton(kernels.matmul, dict(a=a, b=b, c=c, **sizes), 80, 4, 3)
    lines = compiled.asm["ptx"].splitlines()
    kept = [x for x in lines if removed is None or not x.strip().startswith(removed)]
    assert removed is None or len(lines) - len(kept) >= 4
    reports = (
        Emulator("\n".join(kept))
        .launch(
            *("matmul", [a, b, c, 64, 64, 160, None, None], 1, 128),
            **dict(shared_bytes=compiled.metadata.shared, outputs=[2]),
        )
        .reports
    )
    assert (kind in {r.kind for r in reports}) if removed else reports == ()
