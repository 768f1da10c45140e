"""The spectrum kernels: PTX by nvcc, executed on the CPU with race checks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from benchmarks.report import csrc_counts
from benchmarks.report.csrc_counts import KERNELS
from featkd import linalg
from ptx_emulator import Emulator
from tests.csrc import cuda_ptx
from tests.csrc.cuda_ptx import solve
from tests.csrc.test_teams import SPECTRUM_BARRIERS
from tests.spectra import FAMILIES, THRESHOLDS, lapack

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, not found")
SAME = [name for name in FAMILIES if name not in ("tiny", "huge")]


@pytest.fixture(scope="module", autouse=True)
def cache(compiled_kernels):
    """Uses the cache folder of the test run."""


@pytest.fixture(scope="module")
def emulators(ptx: str) -> dict[type, Emulator]:
    return {
        real: Emulator(csrc_counts.entry(ptx, name), count=real == np.float32)
        for real, name in KERNELS.items()
    }


@pytest.fixture(scope="module")
def switchable(ptx: str) -> Emulator:
    kernel = KERNELS[np.float32]
    return Emulator(cuda_ptx.with_switches(csrc_counts.entry(ptx, kernel), kernel))


def family(names: list[str], rows: int, columns: int, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng([rows, columns])
    return np.stack([FAMILIES[name](rows, columns, rng) for name in names]).astype(dtype)


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (5, 9), (33, 20)], ids=str)
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
    counted = csrc_counts.Counted(64, 64, found.launch.counters)
    # per matrix: 2 for the scale, 2 per 16 packed columns, 4 per row, 3 between the steps
    assert counted.counters.barriers == 2 * (2 + 2 * 4 + 4 * 64 + 3)
    assert counted.bytes >= 2 * 4 * 64 * 64
    # half of the Gram matrix with its diagonal, one multiply-add per term
    assert counted.operations("f32") >= 2 * 64 * (64 + 1) // 2 * 64


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


def test_ptx_contains_every_barrier(ptx: str, switchable):
    for kernel in KERNELS.values():
        assert cuda_ptx.barriers(csrc_counts.entry(ptx, kernel)) == set(SPECTRUM_BARRIERS)
    x = family(["features", "zero"], 20, 9)
    assert solve(switchable, x, np.float32, blocks=1).launch.reports == ()


@pytest.mark.parametrize("number", SPECTRUM_BARRIERS)
def test_skipped_barrier_is_reported(switchable, number: int):
    x = family(["features", "zero", "zero", "diagonal"], 36, 40)
    reports = solve(switchable, x, np.float32, blocks=1, dropped=number).launch.reports
    assert {r.kind for r in reports} & {"shared-race", "uninitialised-read", "divergent-barrier"}
