"""The CUDA kernels of csrc: PTX by nvcc, executed on the CPU with race checks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from featkd import linalg
from featkd.ops import extension
from ptx_emulator import Emulator
from tests.csrc import cuda_ptx
from tests.csrc.cuda_ptx import JACOBI, SPECTRUM, entry, solve
from tests.csrc.test_teams import JACOBI_BARRIERS, SPECTRUM_BARRIERS
from tests.spectra import FAMILIES, THRESHOLDS, lapack

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, not found")
SAME = [name for name in FAMILIES if name not in ("tiny", "huge")]


@pytest.fixture(scope="module", autouse=True)
def cache(compiled_kernels):
    """Uses the cache folder of the test run."""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return cuda_ptx.compile_ptx(tmp_path_factory.mktemp("ptx"))


@pytest.fixture(scope="module")
def emulators(ptx: str) -> dict[type, Emulator]:
    return {
        real: Emulator(entry(ptx, name), count=real == np.float32)
        for real, name in SPECTRUM.items()
    }


@pytest.fixture(scope="module")
def switchable(ptx: str) -> Emulator:
    kernel = SPECTRUM[np.float32]
    return Emulator(cuda_ptx.with_switches(entry(ptx, kernel), kernel))


def family(names: list[str], rows: int, columns: int, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng([rows, columns])
    return np.stack([FAMILIES[name](rows, columns, rng) for name in names]).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "seed"), [((1, 3), 0), ((2, 2), 1), ((5, 9), 7), ((5, 9), 0), ((33, 20), 1)], ids=str
)
def test_spectra_of_all_families(emulators, shape, seed):
    x = family(list(FAMILIES), *shape)
    expected, twin = lapack(x), linalg.spectrum(torch.from_numpy(x), THRESHOLDS)
    for real, emulator in emulators.items():
        found = solve(emulator, x, real, blocks=3, seed=seed)
        assert found.launch.reports == ()
        assert (found.info == 0).all()
        bound = 5e-7 if real == np.float32 else 6e-8  # the curve is rounded to float32
        assert np.abs(found.curve - expected.curve).max() <= bound
        assert np.abs(found.curve - twin.curve.numpy()).max() <= 6e-7
        sure = found.resolved == 0
        assert (found.ranks == expected.ranks)[sure].all()
        if real == np.float64:
            assert sure.all()


def test_64x64_matrices_and_instruction_counts(emulators):
    x = family(["features", "dominated 0.99"], 64, 64)
    found = solve(emulators[np.float32], x, np.float32, seed=3)
    assert found.launch.reports == ()
    assert np.abs(found.curve - lapack(x).curve).max() <= 5e-7
    counters = found.launch.counters
    # per matrix: 2 for the scale, 2 per 16 packed columns, 4 per row, 3 between the steps
    assert counters.barriers == 2 * (2 + 2 * 4 + 4 * 64 + 3)
    assert counters.distinct_read_bytes + counters.distinct_write_bytes >= 2 * 4 * 64 * 64
    operations = sum(n for name, n in counters.instructions.items() if name.endswith("f32"))
    # half of the Gram matrix with its diagonal, one multiply-add per term
    assert operations >= 2 * 64 * (64 + 1) // 2 * 64


def test_element_types_strides_and_scratch_in_global_memory(emulators):
    x = family(["features", "repeated"], 24, 11)
    bits = (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    turned = np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0)
    for given, same in ((bits, rounded), (turned, x), (x.astype(np.float64), x)):
        for real, emulator in emulators.items():
            for in_shared in (True, False):
                found = solve(emulator, given, real, in_shared=in_shared)
                assert found.launch.reports == ()
                assert np.abs(found.curve - lapack(same).curve).max() <= 5e-7


def test_nonfinite_matrix_does_not_affect_others(emulators):
    x = family(SAME[:6], 12, 15)
    clean = solve(emulators[np.float32], x, np.float32, blocks=1)
    x[1, 0, 0], x[4, 11, 14] = np.nan, -np.inf
    found = solve(emulators[np.float32], x, np.float32, blocks=1)
    assert found.launch.reports == ()
    assert found.info.tolist() == [0, 1, 0, 0, 1, 0]
    assert np.isnan(found.values[[1, 4]]).all()
    assert (found.ranks[[1, 4]] == -1).all()
    kept = [0, 2, 3, 5]
    assert (found.curve[kept] == clean.curve[kept]).all()


def test_ptx_of_the_spectrum_kernels_contains_every_barrier(ptx: str, switchable):
    for kernel in SPECTRUM.values():
        assert cuda_ptx.barriers(entry(ptx, kernel)) == set(SPECTRUM_BARRIERS)
    x = family(["features", "zero"], 20, 9)
    assert solve(switchable, x, np.float32, blocks=1).launch.reports == ()


@pytest.mark.parametrize("number", SPECTRUM_BARRIERS)
def test_skipped_barrier_of_a_spectrum_kernel_is_reported(switchable, number: int):
    x = family(["features", "zero", "zero", "diagonal"], 36, 40)
    reports = solve(switchable, x, np.float32, blocks=1, dropped=number).launch.reports
    assert {r.kind for r in reports} & {"shared-race", "uninitialised-read", "divergent-barrier"}


@pytest.fixture(scope="module")
def jacobi(ptx: str) -> Emulator:
    """Emulator of PTX with one more argument: a barrier to skip, 0 for none."""
    more = cuda_ptx.with_argument(entry(ptx, JACOBI), JACOBI, 8)
    return Emulator(cuda_ptx.with_switches(more, JACOBI, 8))


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
def test_jacobi_decomposition_of_all_families(jacobi, n: int, seed: int):
    r = triangles(n) if n < 17 else triangles(n)[[2, 4, 8, 13]]
    found = cuda_ptx.jacobi(jacobi, r, blocks=3, seed=seed)
    check(found, r)
    rows, _, sweeps = by_cpu(r)
    # sums have another order, so rounding noise may take a few sweeps more
    lengths = np.linalg.norm(found.rows, axis=-1) - np.linalg.norm(rows, axis=-1)
    assert np.abs(lengths).max() <= 2 * n * np.finfo(r.dtype).eps
    assert np.abs(found.sweeps - sweeps).max() <= 3
    if n < 17:
        assert found.sweeps[list(FAMILIES).index("zero")] == 1


def test_jacobi_in_exact_arithmetic_is_bitwise_equal_to_cpu(jacobi):
    """A diagonal, 2 x 2 blocks and a single row, for which sums over a row are exact."""
    r = np.zeros((3, 12, 12))
    r[0] = np.diag(2.0 ** np.arange(12))
    r[1] = np.kron(np.eye(6), [[1, 1], [1, -1]])
    r[2, :, 0] = np.arange(12) == 5
    found = cuda_ptx.jacobi(jacobi, r)
    check(found, r)
    for one, other in zip((found.rows, found.turns, found.sweeps), by_cpu(r), strict=True):
        assert (one == other).all()


def test_jacobi_with_scratch_in_global_memory_and_several_bands(jacobi):
    r = triangles(33, 2)
    found = cuda_ptx.jacobi(jacobi, r)
    check(found, r)
    again = cuda_ptx.jacobi(jacobi, r, in_shared=False, seed=3, blocks=1)
    assert again.launch.reports == ()
    assert (again.rows == found.rows).all()
    assert (again.turns == found.turns).all()


def test_ptx_of_the_jacobi_kernel_contains_every_barrier(ptx: str):
    assert cuda_ptx.barriers(entry(ptx, JACOBI)) == set(JACOBI_BARRIERS)


@pytest.mark.parametrize("number", JACOBI_BARRIERS)
def test_skipped_barrier_of_the_jacobi_kernel_is_reported(jacobi, number: int):
    reports = cuda_ptx.jacobi(jacobi, triangles(9, 1), dropped=number).launch.reports
    assert "shared-race" in {r.kind for r in reports}
