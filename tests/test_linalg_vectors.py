"""svd, leading vectors and angles between subspaces: accuracy, bad matrices, gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import featkd
from featkd import linalg
from featkd.ops import jacobi, orthonormal
from tests.spectra import matrices


@pytest.fixture(params=["cpu", "gpu"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the code path of a CPU and with that of a GPU, both on the CPU."""
    if request.param == "gpu":
        monkeypatch.setattr(orthonormal, "is_batched_only", lambda x: True)


def results_and_gradient(function: Callable[..., object], *given: Tensor) -> list[Tensor]:
    """Results of a function, and gradients of a sum that is independent of the vectors' signs."""
    x = [part.clone().requires_grad_() for part in given]
    found = function(*x)
    parts = [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]
    gradients = torch.autograd.grad(sum(part.square().square().sum() for part in parts), x)
    return [*(part.detach() for part in parts), *gradients]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "function", [linalg.svdvals, linalg.energy_curve, linalg.svd, partial(linalg.svd, k=3)]
)
def test_nonfinite_matrix_does_not_affect_other_results_and_gradients(
    function: Callable[[Tensor], object], backend: str, bad: float
):
    for rows, columns, dtype in ((6, 9, torch.float64), (9, 6, torch.float32)):
        clean = matrices("features", rows, columns, count=4).to(dtype)
        dirty = clean.clone()
        dirty[2, 5, 5] = bad
        with featkd.use_backend(backend):
            before = results_and_gradient(function, clean)
            after = results_and_gradient(function, dirty)
        for one, other in zip(before, after, strict=True):
            assert other[2].isnan().all()
            assert torch.equal(one[[0, 1, 3]], other[[0, 1, 3]])
            assert not one.isnan().any()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_nonfinite_matrix_does_not_affect_other_leading_vectors(shape: tuple[int, int]):
    clean = matrices("features", *shape, count=4)
    dirty = clean.clone()
    dirty[2] = float("inf")
    for one, other in zip(linalg.svd(clean, 4), linalg.svd(dirty, 4), strict=True):
        assert other[2].isnan().all()
        assert torch.equal(one[[0, 1, 3]], other[[0, 1, 3]])


@pytest.mark.usefixtures("route")
def test_nonfinite_pair_does_not_affect_other_angles():
    one, other = matrices("flat", 12, 3, count=4), matrices("geometric", 12, 5, count=4)
    before = results_and_gradient(linalg.principal_angles, one, other)
    bad = one.clone(), other.clone()
    bad[0][1, 4, 2] = float("nan")
    bad[1][2, 0, 0] = -float("inf")
    for pair in (bad, bad[::-1]):
        after = results_and_gradient(linalg.principal_angles, *pair)
        same = before if pair is bad else [before[0], before[2], before[1]]
        for clean, dirty in zip(same, after, strict=True):
            assert dirty[[1, 2]].isnan().all()
            assert torch.equal(clean[[0, 3]], dirty[[0, 3]])
            assert not clean.isnan().any()


@pytest.mark.usefixtures("route")
def test_leading_vectors():
    for shape in ((2, 60, 90), (90, 60), (40, 40)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x = x * 0.9 ** torch.arange(shape[-1])
        u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
        for k in (1, 7, 40):
            found = linalg.svd(x, k=k)
            assert found.U.shape == (*shape[:-1], k)
            assert found.Vh.shape == (*shape[:-2], k, shape[-1])
            torch.testing.assert_close(found.S.double(), s[..., :k], rtol=0, atol=1e-5)
            for part in (found.U.double(), found.Vh.double().mT):
                assert (part.mT @ part - torch.eye(k)).abs().max() <= 5e-6
            shown = found.U * found.S.unsqueeze(-2) @ found.Vh
            best = (u[..., :k] * s[..., None, :k] @ vh[..., :k, :]).float()
            torch.testing.assert_close(shown, best, rtol=0, atol=2e-5)
    assert linalg.svd(torch.zeros(3, 4), k=2).S.tolist() == [0, 0]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("scale", [1e-170, 1e-307, 5e-324, 1e160, 3e307])
def test_leading_vectors_at_any_scale(scale: float):
    values = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64) * scale
    for x in (torch.diag(values), torch.diag(values)[:, [0, 1, 2, 2]], torch.eye(4, 3) * values):
        exact = torch.linalg.svd(x, full_matrices=False)
        for k in (1, 3):
            found = linalg.svd(x, k=k)
            torch.testing.assert_close(found.S, exact.S[:k], rtol=1e-12, atol=0)
            shown = found.U * (found.S / scale) @ found.Vh
            best = exact.U[:, :k] * (exact.S[:k] / scale) @ exact.Vh[:k]
            torch.testing.assert_close(shown, best)


@pytest.mark.usefixtures("route")
def test_matrices_of_a_batch_have_separate_scales():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = torch.tensor([2.0**-700, 0.0, 2.0**600], dtype=torch.float64)
    found, each = linalg.svd(x * scales[:, None, None], k=2), linalg.svd(x, k=2)
    torch.testing.assert_close(found.S, each.S * scales[:, None], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.U[[0, 2]], each.U[[0, 2]])


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(40, 50), (50, 40)], ids=str)
def test_leading_values_of_low_rank_matrices_are_sorted(shape: tuple[int, int], rank: int):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, n, rank, generator=generator).double() for n in shape)
    x = left @ right.mT
    found = linalg.svd(x, k=20)
    assert (found.S.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(found.U * found.S.unsqueeze(-2) @ found.Vh, x)
    for part in (found.U, found.Vh.mT):
        assert (part.mT @ part - torch.eye(20)).abs().max() < 1e-12
    # the vectors of each value go with it
    lengths = torch.linalg.vector_norm(found.U.mT @ x, dim=-1)
    torch.testing.assert_close(lengths, found.S, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("family", ["features", "geometric"])
def test_leading_subspaces_are_as_accurate_as_float32_svd(family: str):
    x = matrices(family, 96, 192).float()
    exact = torch.linalg.svd(x.double(), full_matrices=False).Vh.mT
    theirs = torch.linalg.svd(x, full_matrices=False).Vh.mT
    for matrix, ranks in enumerate(linalg.energy_ranks(x, (0.8, 0.9, 0.95)).tolist()):
        for k in ranks:
            want = exact[matrix, :, :k]
            ours = linalg.svd(x[matrix], k=k).Vh.mT
            errors = [
                linalg.principal_angles(v.double(), want).sin().max()
                for v in (ours, theirs[matrix, :, :k])
            ]
            assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps, (k, errors)


def test_thin_svd_matches_torch():
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    found, theirs = linalg.svd(x), torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close((found.U * found.S.unsqueeze(-2)) @ found.Vh, x.detach())
    torch.testing.assert_close(found.S, theirs.S)
    (ours,) = torch.autograd.grad((found.U.abs() @ found.Vh.abs()).sum(), x)
    (expected,) = torch.autograd.grad((theirs.U.abs() @ theirs.Vh.abs()).sum(), x)
    torch.testing.assert_close(ours, expected)


def test_gradients_of_leading_vectors_match_torch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)

    def loss(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:  # independent of the vectors' signs
        return (weights * ((u * s.exp().unsqueeze(-2)) @ vh)).sum() + (u.abs() @ vh.abs()).sum()

    for k in (1, 3, 4):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        (theirs,) = torch.autograd.grad(loss(u[..., :k], s[..., :k], vh[..., :k, :]), x)
        (ours,) = torch.autograd.grad(loss(*linalg.svd(x, k)), x)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            assert not linalg.svd(x, k).S.requires_grad
            torch.testing.assert_close(loss(*linalg.svd(x, k)), loss(*linalg.svd(x.detach(), k)))
    assert torch.autograd.gradcheck(lambda x: loss(*linalg.svd(x, 2)), x)
    assert torch.autograd.gradgradcheck(lambda x: loss(*linalg.svd(x, 2)), x)
    half = x.detach().bfloat16().requires_grad_()
    found = linalg.svd(half, 2)
    assert {part.dtype for part in found} == {torch.float32}
    found.S.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_leading_vectors_on_gpu_use_jacobi(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(orthonormal, "is_batched_only", lambda x: True)
    x = matrices("features", 40, 30)
    found = linalg.svd(x, 5)
    assert featkd.last_backend("svd") == "cpu"  # Jacobi of csrc
    monkeypatch.setattr(jacobi, "_MOST_SWEEPS", 1)
    assert all(part.isnan().all() for part in linalg.svd(x, 5))
    with featkd.use_backend("reference"):
        torch.testing.assert_close(linalg.svd(x, 5).S, found.S)
    assert featkd.last_backend("svd") == "reference"


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_last_backend_of_svd(k: int | None, grad: bool):
    linalg.svd(torch.eye(3), method="jacobi")
    assert featkd.last_backend("svd") == "cpu"
    linalg.svd(torch.eye(3, requires_grad=grad), k)
    assert featkd.last_backend("svd") == "reference"


@pytest.mark.usefixtures("route")
def test_principal_angles():
    angles = torch.tensor([1e-9, 1e-4, 0.3, torch.pi / 2 - 1e-9], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    base = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    v1 = base[:, :4]
    v2 = torch.cat([base[:, :4] * angles.cos() + base[:, 4:8] * angles.sin(), base[:, 8:9]], 1)
    mixed = v2 @ torch.randn(5, 5, generator=generator, dtype=torch.float64)
    for one, other in ((v1, mixed), (mixed, v1)):
        found = linalg.principal_angles(one, other)
        torch.testing.assert_close(found, angles, rtol=1e-6, atol=1e-14)
    with pytest.raises(ValueError, match="v2: expected 20 rows"):
        linalg.principal_angles(v1, v2[:19])
    with pytest.raises(ValueError, match="at most as many columns as rows"):
        linalg.principal_angles(v1.T, v1.T)
