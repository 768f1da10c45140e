"""Singular values, curves and ranks: accuracy, bad input, autograd, compilation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import featkd
from featkd import linalg
from featkd.ops import extension, reference
from featkd.ops import spectrum as spectrum_op
from tests.spectra import FAMILIES, THRESHOLDS, lapack, matrices, with_values

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((196, 192), (196, 384), (49, 96), (64, 64), (33, 20), (5, 5), (1, 7), (3, 1))

NEEDED: dict[str, set[str]] = {  # processor flags for each instruction set of csrc/isa.cpp
    "portable": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx2", "fma", "avx512f", "avx512dq", "avx512vl"},
}


def processor_flags() -> set[str]:
    """Processor flags as Linux names them; empty except on x86."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def run(code: str, **environment: str) -> None:
    """Runs code in a separate process."""
    path = os.pathsep.join((str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")))
    known = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_extension_is_built_and_used():
    assert extension.missing() == ""
    linalg.svdvals(torch.ones(2, 3))
    assert featkd.last_backend("spectrum") == "cpu"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_and_curves_match_float64_lapack(family: str, shape: tuple[int, int]):
    for dtype in (torch.float32, torch.float64):
        x = matrices(family, *shape).to(dtype)
        found, expected = linalg.spectrum(x, THRESHOLDS), lapack(x.numpy())
        assert (found.ranks.numpy() == expected.ranks).all()
        bound = 3e-7 if dtype == torch.float32 else 1e-12
        assert np.abs(found.curve.double().numpy() - expected.curve).max() <= bound
        assert (found.info == 0).all()
        assert found.residual.max() < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_svdvals_error_is_below_float32_rounding(family: str):
    x = matrices(family, 196, 96).float()
    expected = lapack(x.numpy()).values
    found = linalg.svdvals(x).double().numpy()
    largest = np.maximum(expected[:, :1], 1e-300)
    assert (np.abs(found - expected) / largest).max() < 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectrum_values_of_each_dtype(dtype: torch.dtype):
    x = matrices("features", 60, 96).to(dtype)
    expected = lapack(x.double().numpy()).values
    found = linalg.spectrum(x).values
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    large = expected >= 1e-2 * expected[:, :1]
    error = np.abs(found.double().numpy() - expected) / expected[:, :1]
    assert error[large].max() < 1e-6


def halves(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Half of the values are a hundredth of the others, the worst case of the float32 solve."""
    n = min(rows, columns)
    return with_values(np.where(np.arange(n) < (n + 1) // 2, 1, 0.01), rows, columns, rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [*FAMILIES.values(), halves])
def test_documented_error_bounds(make: Callable[..., np.ndarray], dtype: torch.dtype):
    x = torch.from_numpy(np.stack([make(96, 120, np.random.default_rng(n)) for n in range(3)]))
    expected = lapack(x.to(dtype).double().numpy()).values
    largest = np.maximum(expected[:, :1], 1e-300)
    error = np.abs(linalg.spectrum(x.to(dtype)).values.double().numpy() - expected)
    shares = expected / largest
    assert (error / largest * shares)[shares >= 1e-2].max(initial=0) <= 5e-7
    # svdvals has a smaller error than spectrum
    error = np.abs(linalg.svdvals(x.to(dtype)).double().numpy() - expected)
    assert (error / largest).max() <= 1e-7


def test_float64_svdvals():
    x = matrices("features", 96, 60)
    expected = lapack(x.numpy()).values
    error = np.abs(linalg.svdvals(x).numpy() - expected) / expected[:, :1]
    assert error[expected >= 1e-3 * expected[:, :1]].max() < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    decay=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_shapes_scales_and_spectra(rows, columns, exponent, decay, seed):
    rng = np.random.default_rng(seed)
    n = min(rows, columns)
    x = (
        rng.standard_normal((3, rows, n))
        * decay ** np.arange(n)
        @ rng.standard_normal((n, columns))
    )
    x = torch.from_numpy(x * 10.0**exponent).float()
    found, expected = linalg.spectrum(x, THRESHOLDS), lapack(x.numpy())
    assert (found.ranks.numpy() == expected.ranks).all()
    assert np.abs(found.curve.double().numpy() - expected.curve).max() <= 3e-7
    assert (found.values.diff(dim=-1) <= 0).all()


def test_subnormal_numbers():
    x = torch.eye(4, 6) * 3e-45
    x[0, 0] = 6e-45
    assert torch.equal(linalg.svdvals(x), x.diagonal())
    wide = torch.eye(4, 6, dtype=torch.float64) * 5e-324
    assert torch.equal(linalg.svdvals(wide), wide.diagonal())


def test_ties_are_resolved_in_float64():
    just_below, just_above = (
        torch.diag(torch.tensor([0.9 + d, 0.1 - d], dtype=torch.float64).sqrt())
        for d in (-3e-8, 3e-8)
    )
    for x, rank in ((just_below, 2), (just_above, 1)):
        found = linalg.spectrum(x.float(), (0.9,))
        assert found.resolved.item() == 1
        assert found.ranks.item() == lapack(x.float()[None].numpy(), (0.9,)).ranks.item() == rank
    assert linalg.spectrum(just_below.float(), (0.8,)).resolved.item() == 0


def test_result_is_bitwise_independent_of_threads_and_batch():
    x = matrices("features", 60, 70, count=7).float()
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(linalg.spectrum(x))
    finally:
        torch.set_num_threads(before)
    runs.append(linalg.spectrum(x[[3]]))
    for field, once in zip(runs[0]._fields, runs[0], strict=True):
        assert torch.equal(once, getattr(runs[1], field))
        assert torch.equal(once, getattr(runs[2], field))
        assert torch.equal(once[3:4], getattr(runs[3], field))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_matrix_does_not_affect_others(bad: float, dtype: torch.dtype):
    clean = matrices("features", 20, 30, count=4).to(dtype)
    dirty = clean.clone()
    dirty[2, 19, 29] = bad
    for name in ("auto", "reference"):
        with featkd.use_backend(name):
            before, after = linalg.spectrum(clean), linalg.spectrum(dirty)
        assert after.info.tolist() == [0, 0, 1, 0]
        assert after.ranks[2].tolist() == [-1] * 4
        assert after.values[2].isnan().all()
        assert after.curve[2].isnan().all()
        assert after.residual[2].isnan()
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[[0, 1, 3]], other[[0, 1, 3]])


def test_views_leading_dimensions_and_unchanged_inputs():
    base = torch.randn(3, 50, 2, 40, generator=torch.Generator().manual_seed(0))
    kept = base.clone()
    for view in (
        base.permute(0, 2, 1, 3),
        base.permute(0, 2, 3, 1),
        base[:, ::3, :, 1::2].permute(2, 0, 1, 3),
        base[0, :, 0, :].expand(2, 2, 50, 40),
        base.permute(2, 1, 0, 3)[..., 7],
    ):
        found = linalg.spectrum(view)
        dense = linalg.spectrum(view.contiguous())
        assert found.values.shape == (*view.shape[:-2], min(view.shape[-2:]))
        assert found.ranks.shape == (*view.shape[:-2], 4)
        assert torch.equal(found.ranks, dense.ranks)
        torch.testing.assert_close(found.values, dense.values, rtol=0, atol=1e-4)
    assert torch.equal(base, kept)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 4, 5), (3, 0, 5), (3, 5, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, ...]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = linalg.spectrum(torch.zeros(shape))
    n = min(shape[-2:])
    assert found.values.shape == found.curve.shape == (*shape[:-2], n)
    assert found.ranks.shape == (*shape[:-2], 4)
    assert (found.ranks == 0).all()


def test_bad_arguments():
    x = torch.ones(2, 3)
    for function in (linalg.svdvals, linalg.energy_ranks, linalg.energy_curve, linalg.svd):
        with pytest.raises(TypeError, match=r"x: expected a floating.*got torch\.int64"):
            function(x.long())
        with pytest.raises(TypeError, match=r"x: expected a floating.*got torch\.complex"):
            function(x.to(torch.complex64))
        with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got list"):
            function([[1.0]])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=re.escape("x: expected at least 2 dimensions")):
            function(x[0])
    for bad in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="thresholds: expected"):
            linalg.energy_ranks(x, (0.8, bad))
    with pytest.raises(TypeError, match=r"thresholds: expected a sequence .*\(0.9,\), got 0.8"):
        linalg.energy_ranks(x, 0.8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="thresholds: expected a number"):
        linalg.energy_ranks(x, ("0.8",))  # type: ignore[arg-type]
    for k in (0, 3, -1):
        with pytest.raises(ValueError, match=f"k: expected None or an int from 1 to 2, got {k}"):
            linalg.svd(x, k=k)
    for k in (2.0, "1", True):
        for method in ("auto", "jacobi"):
            with pytest.raises(TypeError, match=f"k: expected None or an int.* to 2, got {k!r}"):
                linalg.svd(x, k=k, method=method)  # type: ignore[arg-type]


def test_large_matrices_or_missing_extension_use_reference(monkeypatch):
    large = torch.randn(1, 513, 514, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="smaller side is not 1 to 512"):
        values = linalg.svdvals(large)
    assert featkd.last_backend("spectrum") == "reference"
    torch.testing.assert_close(values, torch.linalg.svdvals(large), rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(extension, "LIBRARY", extension.LIBRARY.with_name("_none.so"))
    with pytest.warns(UserWarning, match="csrc is not built"):
        assert linalg.energy_ranks(torch.eye(10)).tolist() == [8, 9, 10, 10]
    assert featkd.last_backend("spectrum") == "reference"


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_reference(family: str):
    x = matrices(family, 20, 30).float()
    expected = reference.spectrum(x, THRESHOLDS)
    for wide in (False, True):
        found = spectrum_op.spectrum(x, THRESHOLDS, wide=wide)
        assert torch.equal(found.ranks, expected[2])
        torch.testing.assert_close(found.curve, expected[1], rtol=0, atol=3e-7)
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_opcheck():
    levels = torch.tensor([0.8, 0.9], dtype=torch.float64)
    for dtype in DTYPES:
        x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        for wide in (False, True):
            torch.library.opcheck(
                torch.ops.featkd.spectrum.default,
                (x.mT.requires_grad_(dtype == torch.float64), levels, wide),
            )


def test_compiles_without_a_graph_break():
    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return linalg.energy_ranks(2 * x), linalg.svdvals(x) + 1, linalg.energy_curve(x)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for shape in ((3, 8, 12), (2, 4, 9, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for one, other in zip(compiled(x), both(x), strict=True):
            assert torch.equal(one, other)


def test_gradients_match_torch():
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for function in (lambda s: s, lambda s: s.square(), lambda s: s.log()):
        (ours,) = torch.autograd.grad((weights * function(linalg.svdvals(x))).sum(), x)
        (theirs,) = torch.autograd.grad((weights * function(torch.linalg.svdvals(x))).sum(), x)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(linalg.svdvals, x)
    assert torch.autograd.gradgradcheck(linalg.svdvals, x)
    assert torch.autograd.gradcheck(linalg.energy_curve, x)
    assert not linalg.energy_ranks(x).requires_grad
    half = x.detach().bfloat16().requires_grad_()
    linalg.svdvals(half).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_only_values_of_spectrum_have_gradient(backend: str):
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with featkd.use_backend(backend):
        found = linalg.spectrum(x)
    assert featkd.last_backend("spectrum") == {"auto": "cpu"}.get(backend, backend)
    assert [name for name, part in found._asdict().items() if part.requires_grad] == ["values"]
    (ours,) = torch.autograd.grad(found.values.square().sum(), x)
    torch.testing.assert_close(ours, 2 * x.detach())


@pytest.mark.parametrize("isa", NEEDED)
def test_each_instruction_set(isa: str):
    """Runs in a separate process, because the instruction set is selected once."""
    missing = NEEDED[isa] - processor_flags()
    if missing:
        pytest.skip(f"this processor has no {' '.join(sorted(missing))}")
    code = (
        "import ctypes, torch; from featkd import linalg; from featkd.ops import extension\n"
        "from tests.spectra import *\n"
        "x = np.stack([f(49, 96, np.random.default_rng(1)) for f in FAMILIES.values()])\n"
        "for t in (torch.float32, torch.float64):\n"
        "    y = torch.from_numpy(x).to(t); found = linalg.spectrum(y, THRESHOLDS)\n"
        "    want = lapack(y.numpy())\n"
        "    assert (found.ranks.numpy() == want.ranks).all()\n"
        "    assert np.abs(found.curve.double().numpy() - want.curve).max() < 3e-7\n"
        "ran = ctypes.CDLL(str(extension.LIBRARY)).featkd_cpu_kernels\n"
        "ran.restype = ctypes.c_char_p\n"
        f"assert ran() == {isa.encode()!r}, ran()\n"
    )
    run(code, FEATKD_ISA=isa)


def test_out_of_memory_raises():
    code = (
        "import resource, torch; from featkd import linalg\n"
        "torch.set_num_threads(512); x = torch.ones(600, 512, 512)\n"
        "linalg.svdvals(x[:1])\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limit[1]))\n"
        "try: linalg.svdvals(x); raise SystemExit('no error')\n"
        "except RuntimeError as error: assert 'out of memory' in str(error), error\n"
        "resource.setrlimit(resource.RLIMIT_AS, limit)\n"
        "torch.set_num_threads(2); assert abs(linalg.svdvals(x[:3])[2, 0] - 512) < 1e-3\n"
    )
    run(code)


def test_offsets_beyond_int32():
    """Element offsets of the second matrix, and of the second row in the transposed view."""
    stride = 2**31 + 1000
    storage = torch.empty(2 * (stride + 30 * 30), dtype=torch.uint8)  # only its ends are accessed
    halves = torch.empty(0, dtype=torch.float16).set_(
        storage.untyped_storage(), 0, (2, 30, 30), (stride, 30, 1)
    )
    assert halves[1].storage_offset() > 2**31
    generator = torch.Generator().manual_seed(0)
    halves.copy_(torch.randn(2, 30, 30, generator=generator))
    for view in (halves, halves.transpose(0, 1)):
        assert max(view.stride()) > 2**31
        assert torch.equal(linalg.svdvals(view), linalg.svdvals(view.clone()))
