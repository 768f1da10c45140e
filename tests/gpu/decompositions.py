"""featkd.linalg: every operator of csrc, against LAPACK in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import featkd
from benchmarks.gpu.recorder import NotHere
from featkd import linalg
from tests.spectra import FAMILIES, THRESHOLDS, lapack, matrices, svd_errors

SHAPES = ((196, 192), (196, 384), (49, 96), (64, 64), (300, 200), (33, 20), (1, 7), (3, 1))
SMALL = ((33, 20), (1, 7))


def _shapes(device: torch.device) -> tuple[tuple[int, int], ...]:
    return SMALL if device.type == "cpu" else SHAPES


def _repeats(work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Runs twice, compares bitwise, and returns the results."""
    once, twice = work(), work()
    for x, y in zip(once, twice, strict=True):
        assert torch.equal(x, y), "does not repeat bitwise"
    return once


def spectra(family: str, device: torch.device) -> None:
    """`spectrum`, `energy_ranks` and `svdvals` agree with LAPACK for a family of matrices."""
    for shape in _shapes(device):
        for dtype in (torch.float32, torch.float64):
            x = matrices(family, *shape).to(dtype)
            expected = lapack(x.numpy())
            moved = x.to(device)
            found = linalg.spectrum(moved, THRESHOLDS)
            assert featkd.last_backend("spectrum") == device.type
            _repeats(partial(linalg.spectrum, moved, THRESHOLDS))
            for ranks in (found.ranks, linalg.energy_ranks(moved, THRESHOLDS)):
                assert (ranks.cpu().numpy() == expected.ranks).all(), f"{shape} {dtype}: ranks"
            # on a GPU the Gram matrix is not summed in float64, as it is on a CPU
            bound = 9e-7 if dtype == torch.float32 else 1e-12
            error = np.abs(found.curve.cpu().double().numpy() - expected.curve).max()
            assert error <= bound, f"{shape} {dtype}: curve off by {error:.1e}"
            values = linalg.svdvals(moved).cpu().double().numpy()
            largest = np.maximum(expected.values[:, :1], 1e-300)
            allowed = 1e-6 if dtype == torch.float32 else 5e-8  # of a Gram matrix's small values
            error = (np.abs(values - expected.values) / largest).max()
            assert error <= allowed, f"{shape} {dtype}: values off by {error:.1e}"


def jacobi(family: str, device: torch.device) -> None:
    """`svd(method="jacobi")` agrees with LAPACK for a family of matrices."""
    shapes = SMALL if device.type == "cpu" else ((196, 384), (300, 200), (17, 17), (1, 4))
    for shape in shapes:
        x = matrices(family, *shape)
        moved = x.to(device)
        found = _repeats(partial(linalg.svd, moved, method="jacobi"))
        assert featkd.last_backend("svd") == device.type
        errors = svd_errors(x, *(part.cpu() for part in found))
        named = f"{shape}: values, orthonormality, product: {errors}"
        assert all(error < 1e-12 for error in errors), named


def leading_vectors(family: str, device: torch.device) -> None:
    """`svd(k)` gives the leading singular values and orthonormal vectors of a family."""
    for shape in SMALL if device.type == "cpu" else ((196, 384), (300, 200), (40, 33)):
        for dtype, allowed, tilt in ((torch.float64, 1e-7, 1e-12), (torch.float32, 1e-5, 1e-5)):
            x = matrices(family, *shape).to(dtype).double()
            k = min(20, *shape)
            u, s, vh = (y.cpu().double() for y in linalg.svd(x.to(device, dtype), k))
            assert featkd.last_backend("svd") == ("cuda" if device.type == "cuda" else "reference")
            values = torch.from_numpy(lapack(x.numpy()).values)
            largest = values[:, :1].clamp_min(1e-300)
            assert ((s - values[:, :k]).abs() / largest).max() < allowed, f"{shape}: values"
            for part in (u, vh.mT):
                gap = (part.mT @ part - torch.eye(k, dtype=part.dtype)).abs().max()
                assert gap < tilt, f"{shape}: not orthonormal"
            error = (x @ vh.mT - u * s.unsqueeze(-2)).abs().amax((1, 2)) / largest[:, 0]
            assert error.max() < allowed, f"{shape}: product"


def angles(device: torch.device) -> None:
    """`principal_angles` agrees with the CPU."""
    one, other = (torch.randn(4, 60, k, dtype=torch.float64) for k in (9, 12))
    found = linalg.principal_angles(one.to(device), other.to(device)).cpu()
    torch.testing.assert_close(found, linalg.principal_angles(one, other), rtol=1e-9, atol=1e-12)


def many_matrices(device: torch.device) -> None:
    """More matrices than blocks, half precision, strides, and scratch in global memory work."""
    count, shape = (40, (9, 12)) if device.type == "cpu" else (4000, (49, 64))
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    moved = x.to(device)
    want = torch.linalg.svdvals(x.double())
    assert (linalg.svdvals(moved).cpu().double() - want).abs().max() < 1e-4
    turned = moved.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(linalg.svdvals(turned), linalg.svdvals(moved))
    half = moved[:8].bfloat16()
    want = torch.linalg.svdvals(half.double().cpu())
    assert (linalg.svdvals(half).cpu().double() - want).abs().max() < 1e-4
    side = 60 if device.type == "cpu" else 512
    for rows in (side - 12, side):
        x = torch.randn(2, rows, side, generator=torch.Generator().manual_seed(1)).double()
        want = torch.linalg.svdvals(x)
        values = linalg.svdvals(x.to(device)).cpu()
        assert (values - want).abs().max() < 1e-6 * want.max()
        values = linalg.svd(x.to(device), method="jacobi").S.cpu()
        assert (values - want).abs().max() < 1e-11 * want.max()


def bad_matrix(device: torch.device) -> None:
    """A matrix with NaN does not change the results of the others."""
    x = matrices("features", 20, 30, count=3).float()
    clean = linalg.spectrum(x.to(device))
    x[1, 3, 3] = float("nan")
    found = linalg.spectrum(x.to(device))
    assert found.info.tolist() == [0, 1, 0]
    assert found.values[1].isnan().all()
    assert (found.ranks[1] == -1).all()
    for kept in (0, 2):
        assert torch.equal(found.values[kept], clean.values[kept])


def side_stream(device: torch.device) -> None:
    """Kernels run on the current stream, after a matrix that arrives late on it."""
    if device.type != "cuda":
        raise NotHere("needs a GPU")
    x = torch.randn(3, 49, 64, device=device)
    want = linalg.svdvals(x)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        values = linalg.svdvals(late)
    stream.synchronize()
    assert torch.equal(values, want)


def captured(name: str, device: torch.device) -> None:
    """A CUDA graph captures an operator, and its replays read the input anew."""
    if device.type != "cuda":
        raise NotHere("needs a GPU")
    work: dict[str, Callable[[Tensor], Tensor]] = {
        "svdvals": linalg.svdvals,
        "energy_ranks": linalg.energy_ranks,
        "curve": linalg.energy_curve,
        "svd": lambda x: linalg.svd(x, 9).S,
        "jacobi": lambda x: linalg.svd(x, method="jacobi").S,
        "angles": lambda x: linalg.principal_angles(x[..., :5], x[..., 3:9]),
    }
    run = work[name]
    dtype = torch.float64 if name == "jacobi" else torch.float32
    x = torch.randn(4, 49, 64, device=device, dtype=dtype)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(x)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(found, run(x)), "a replay differs"


Check = Callable[[torch.device], None]


def cases(*, small: bool = False) -> dict[str, Check]:
    """Returns the checks by name; `small` for a CPU."""
    families = ("features", "zero") if small else tuple(FAMILIES)
    found: dict[str, Check] = {}
    for family in families:
        name = family.replace(" ", "-")
        found[f"spectra/{name}"] = partial(spectra, family)
        found[f"jacobi/{name}"] = partial(jacobi, family)
        found[f"leading_vectors/{name}"] = partial(leading_vectors, family)
    for alone in (angles, many_matrices, bad_matrix, side_stream):
        found[alone.__name__] = alone
    for op in ("svdvals", "energy_ranks", "curve", "svd", "jacobi", "angles"):
        found[f"captured/{op}"] = partial(captured, op)
    return found
