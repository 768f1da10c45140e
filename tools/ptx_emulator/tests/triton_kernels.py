"""Triton kernels for the tests of the emulator, their inputs, and a comparison of results."""

import torch
import triton
import triton.language as tl

# spacing of values in [1, 2)
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, ulps: float) -> None:
    """Asserts that the largest error is at most `ulps` units of the output's type."""
    error = (got.double() - want).abs().max().item()
    assert error <= ulps * ULP[got.dtype] * want.abs().max().item()


@triton.jit
def row_mean(x, o, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + tl.program_id(0) * n + columns, mask=columns < n, other=0.0)
    tl.store(o + tl.program_id(0), tl.sum(values, 0) / n)


@triton.jit
def softmax(x, o, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * n + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < n
    values = tl.load(x + at, mask=mask, other=-float("inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, 0))
    tl.store(o + at, (values / tl.sum(values, 0)).to(o.dtype.element_ty), mask=mask)


@triton.jit
def matmul(a, b, c, M, N, K, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = (m[:, None] < M) & (k[None, :] < K)
        right = (k[:, None] < K) & (n[None, :] < N)
        x = tl.load(a + m[:, None] * K + k[None, :], mask=left, other=0.0)
        y = tl.load(b + k[:, None] * N + n[None, :], mask=right, other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c + m[:, None] * N + n[None, :], total.to(c.dtype.element_ty), mask=inside)


@triton.jit
def attention(q, k, v, o, N, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) * N * D
    d = tl.arange(0, D)
    at = head + rows[:, None] * D + d[None, :]
    queries = tl.load(q + at, mask=rows[:, None] < N, other=0.0)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, N, KEYS):
        keys = start + tl.arange(0, KEYS)
        there = head + keys[:, None] * D + d[None, :]
        kt = tl.load(k + there, mask=keys[:, None] < N, other=0.0)
        vt = tl.load(v + there, mask=keys[:, None] < N, other=0.0)
        scores = tl.dot(queries, tl.trans(kt)) * scale
        scores = tl.where(keys[None, :] < N, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        share = tl.exp(scores - new_top[:, None])
        fade = tl.exp(top - new_top)
        weight = weight * fade + tl.sum(share, 1)
        total = total * fade[:, None] + tl.dot(share.to(vt.dtype), vt)
        top = new_top
    result = (total / weight[:, None]).to(o.dtype.element_ty)
    tl.store(o + at, result, mask=rows[:, None] < N)


@triton.jit
def descriptor_matmul(a, b, c, K, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, DEPTH):
        total = tl.dot(a.load([m, k]), b.load([k, n]), total)
    c.store([m, n], total.to(c.dtype))


@triton.jit
def evicting_sum(x, y, o, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(x + at, mask=at < n, eviction_policy="evict_first")
    last = tl.load(y + at, mask=at < n, eviction_policy="evict_last")
    tl.store(o + at, first + last, mask=at < n, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["free"], do_not_specialize_on_alignment=["unaligned"])
def integers(o, plain, free, unaligned, wide: tl.int64):
    tl.store(o, plain + free + unaligned + wide)
