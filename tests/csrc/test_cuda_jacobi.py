"""The Jacobi kernel as nvcc compiles it, executed on the CPU with race checks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from featkd.benchmarks import csrc_counts
from featkd.ops import extension
from featkd.ptx import Emulator
from tests.csrc import cuda_ptx
from tests.csrc.test_teams import JACOBI_BARRIERS
from tests.spectra import FAMILIES

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, not found")
KERNEL = cuda_ptx.JACOBI[np.float64]


@pytest.fixture(scope="module", autouse=True)
def cache(compiled_kernels):
    """The test run's own cache folder."""


@pytest.fixture(scope="module")
def emulator(ptx: str) -> Emulator:
    """Of nvcc's PTX with one more argument, a barrier to leave out: 0 for none."""
    more = cuda_ptx.with_argument(csrc_counts.entry(ptx, KERNEL), KERNEL, 8)
    return Emulator(cuda_ptx.with_switches(more, KERNEL, 8))


def triangles(n: int, count: int | None = None) -> np.ndarray:
    """Of the QR of one matrix of each family, with a largest element of 1."""
    rng = np.random.default_rng(n)
    x = np.stack([make(n + 2, n, rng) for make in list(FAMILIES.values())[:count]])
    r = np.linalg.qr(x)[1]
    largest = np.abs(r).max((1, 2), keepdims=True)
    return r / np.where(largest > 0, largest, 1)


def check(found: cuda_ptx.Turned, r: np.ndarray) -> None:
    """No report; rows = turns R, orthogonal, in descending order, of R's singular values."""
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
    counted = lengths > 1e-130  # below, rows are left as they are
    assert cosines[counted[:, None] & counted[..., None]].max(initial=0) <= rounding


def by_cpu(r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the same source finds as a team of one."""
    assert extension.missing() == ""
    n = r.shape[-1]
    padded = np.pad(r, ((0, 0), (0, 0), (0, -n % 8)))
    rows, turns, sweeps = torch.ops.featkd.jacobi(torch.from_numpy(padded))
    return rows[..., :n].numpy(), turns[..., :n].numpy(), sweeps.numpy()


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (2, 1), (7, 2), (8, 0), (9, 7), (17, 1)])
def test_families_without_a_report(emulator, n: int, seed: int):
    r = triangles(n) if n < 17 else triangles(n)[[2, 4, 8, 13]]
    found = cuda_ptx.jacobi(emulator, r, blocks=3, seed=seed)
    check(found, r)
    rows, _, sweeps = by_cpu(r)
    # sums over a row come in another order: what is noise of the rounding may need a sweep more
    lengths = np.linalg.norm(found.rows, axis=-1) - np.linalg.norm(rows, axis=-1)
    assert np.abs(lengths).max() <= 2 * n * np.finfo(r.dtype).eps
    assert np.abs(found.sweeps - sweeps).max() <= 3
    if n < 17:
        assert found.sweeps[list(FAMILIES).index("zero")] == 1


def test_exact_numbers_give_the_very_results_of_a_cpu(emulator):
    """Of a diagonal, of 2 x 2 blocks and of one row: sums over a row round nothing."""
    r = np.zeros((3, 12, 12))
    r[0] = np.diag(2.0 ** np.arange(12))
    r[1] = np.kron(np.eye(6), [[1, 1], [1, -1]])
    r[2, :, 0] = np.arange(12) == 5
    found = cuda_ptx.jacobi(emulator, r)
    check(found, r)
    for one, other in zip((found.rows, found.turns, found.sweeps), by_cpu(r), strict=True):
        assert (one == other).all()


def test_in_global_memory_and_more_than_a_band_and_a_vector(emulator):
    r = triangles(33, 2)
    found = cuda_ptx.jacobi(emulator, r)
    check(found, r)
    again = cuda_ptx.jacobi(emulator, r, in_shared=False, seed=3, blocks=1)
    assert again.launch.reports == ()
    assert (again.rows == found.rows).all()
    assert (again.turns == found.turns).all()


def test_every_barrier_is_in_the_ptx(ptx: str):
    assert cuda_ptx.barriers(csrc_counts.entry(ptx, KERNEL)) == set(JACOBI_BARRIERS)


@pytest.mark.parametrize("number", JACOBI_BARRIERS)
def test_a_dropped_barrier_is_reported(emulator, number: int):
    reports = cuda_ptx.jacobi(emulator, triangles(9, 1), dropped=number).launch.reports
    assert "shared-race" in {r.kind for r in reports}
