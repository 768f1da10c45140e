"""The Jacobi kernel: PTX by nvcc, executed on the CPU with race checks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from benchmarks.report import csrc_counts
from featkd.ops import extension
from ptx_emulator import Emulator
from tests.csrc import cuda_ptx
from tests.csrc.test_teams import JACOBI_BARRIERS
from tests.spectra import FAMILIES

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, not found")
KERNEL = cuda_ptx.JACOBI[np.float64]


@pytest.fixture(scope="module", autouse=True)
def cache(compiled_kernels):
    """Uses the cache folder of the test run."""


@pytest.fixture(scope="module")
def emulator(ptx: str) -> Emulator:
    """Emulator of PTX with one more argument: a barrier to skip, 0 for none."""
    more = cuda_ptx.with_argument(csrc_counts.entry(ptx, KERNEL), KERNEL, 8)
    return Emulator(cuda_ptx.with_switches(more, KERNEL, 8))


def triangles(n: int, count: int | None = None) -> np.ndarray:
    """R of the QR of one matrix per family, scaled to a largest element of 1."""
    rng = np.random.default_rng(n)
    x = np.stack([make(n + 2, n, rng) for make in list(FAMILIES.values())[:count]])
    r = np.linalg.qr(x)[1]
    largest = np.abs(r).max((1, 2), keepdims=True)
    return r / np.where(largest > 0, largest, 1)


def check(found: cuda_ptx.Turned, r: np.ndarray) -> None:
    """Checks that rows = rotations @ R are orthogonal, with R's sorted singular values as norms."""
    assert found.launch.reports == ()
    n = r.shape[-1]
    rounding = 4 * n * np.finfo(r.dtype).eps
    lengths = np.linalg.norm(found.rows, axis=-1)
    assert np.abs(lengths - np.linalg.svd(r, compute_uv=False)).max() <= rounding
    assert (np.diff(lengths) <= rounding * lengths[:, :-1]).all()
    turns = found.turns
    assert np.abs(turns @ turns.mT - np.eye(n)).max() <= rounding
    assert np.abs(turns.mT @ found.rows - r).max() <= rounding
    unit = found.rows / np.where(lengths > 0, lengths, 1)[..., None]
    cosines = np.abs(unit @ unit.mT - np.eye(n) * (lengths > 0)[..., None])
    counted = lengths > 1e-130  # shorter rows are not rotated
    assert cosines[counted[:, None] & counted[..., None]].max(initial=0) <= rounding


def by_cpu(r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Results of the CPU kernel, which is compiled from the same source."""
    assert extension.missing() == ""
    n = r.shape[-1]
    padded = np.pad(r, ((0, 0), (0, 0), (0, -n % 8)))
    rows, turns, sweeps = torch.ops.featkd.jacobi(torch.from_numpy(padded))
    return rows[..., :n].numpy(), turns[..., :n].numpy(), sweeps.numpy()


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (2, 1), (7, 2), (8, 0), (9, 7), (17, 1)])
def test_decomposition_of_all_families(emulator, n: int, seed: int):
    r = triangles(n) if n < 17 else triangles(n)[[2, 4, 8, 13]]
    found = cuda_ptx.jacobi(emulator, r, blocks=3, seed=seed)
    check(found, r)
    rows, _, sweeps = by_cpu(r)
    # sums have another order, so rounding noise may take a few sweeps more
    lengths = np.linalg.norm(found.rows, axis=-1) - np.linalg.norm(rows, axis=-1)
    assert np.abs(lengths).max() <= 2 * n * np.finfo(r.dtype).eps
    assert np.abs(found.sweeps - sweeps).max() <= 3
    if n < 17:
        assert found.sweeps[list(FAMILIES).index("zero")] == 1


def test_exact_arithmetic_is_bitwise_equal_to_cpu(emulator):
    """A diagonal, 2 x 2 blocks and a single row, for which sums over a row are exact."""
    r = np.zeros((3, 12, 12))
    r[0] = np.diag(2.0 ** np.arange(12))
    r[1] = np.kron(np.eye(6), [[1, 1], [1, -1]])
    r[2, :, 0] = np.arange(12) == 5
    found = cuda_ptx.jacobi(emulator, r)
    check(found, r)
    for one, other in zip((found.rows, found.turns, found.sweeps), by_cpu(r), strict=True):
        assert (one == other).all()


def test_scratch_in_global_memory_with_several_bands(emulator):
    r = triangles(33, 2)
    found = cuda_ptx.jacobi(emulator, r)
    check(found, r)
    again = cuda_ptx.jacobi(emulator, r, in_shared=False, seed=3, blocks=1)
    assert again.launch.reports == ()
    assert (again.rows == found.rows).all()
    assert (again.turns == found.turns).all()


def test_ptx_contains_every_barrier(ptx: str):
    assert cuda_ptx.barriers(csrc_counts.entry(ptx, KERNEL)) == set(JACOBI_BARRIERS)


@pytest.mark.parametrize("number", JACOBI_BARRIERS)
def test_skipped_barrier_is_reported(emulator, number: int):
    reports = cuda_ptx.jacobi(emulator, triangles(9, 1), dropped=number).launch.reports
    assert "shared-race" in {r.kind for r in reports}
