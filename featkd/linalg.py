"""Batched singular values, energy ranks and subspaces of small matrices, such as feature maps.

Shapes: any leading batch dimensions, then N tokens and D channels; n = min(N, D). The compiled
library of csrc/ runs if the smaller side is from 1 to 512 (on a CPU one matrix per thread),
otherwise torch.linalg. `featkd.last_backend("spectrum")` or `("svd")` returns which one ran. No
function writes to its input. docs/linalg.md describes the algorithm and its accuracy.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from featkd.ops import backends, orthonormal, reference
from featkd.ops import jacobi as jacobi_op
from featkd.ops import spectrum as spectrum_op
from featkd.ops.spectrum import Spectrum
from featkd.runtime import checks
from featkd.runtime.dtypes import accumulation_dtype

__all__ = [
    "SVD",
    "Spectrum",
    "energy_curve",
    "energy_ranks",
    "principal_angles",
    "spectrum",
    "svd",
    "svdvals",
]

THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
_NOISE = 2.0**-40  # relative to the largest: a shorter vector consists of rounding errors


class SVD(NamedTuple):
    """Result of `svd`: X = U diag(S) Vh, as in torch.linalg.svd.

    Attributes:
        U: (..., N, k), orthonormal columns.
        S: (..., k), descending.
        Vh: (..., k, D), orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def svdvals(x: Tensor) -> Tensor:
    """Singular values: the square roots of the eigenvalues of X X^T, descending.

    Args:
        x: (..., N, D), floating.

    Returns:
        (..., n), float64 for float64 and otherwise float32. NaN for a matrix that contains NaN or
        Inf, and so is its gradient.

    Raises:
        TypeError: `x` is not a real floating-point tensor.
        ValueError: `x` has fewer than two dimensions.
        RuntimeError: not enough memory for the scratch space.

    Notes:
        Always computed in float64. For float32 inputs the error is at most float32's rounding of
        the largest value. For float64 inputs the error of a value s is about 1e-16 s_1^2 / s; use
        `svd(method="jacobi")` for tiny values. Twice differentiable; the gradient uses
        torch.linalg.svd. Results are bitwise repeatable.

    Examples:
        >>> import torch
        >>> svdvals(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
        tensor([4., 3.])
    """
    _check_matrices("x", x)
    return spectrum_op.spectrum(x, (), wide=True).values


def spectrum(x: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Spectrum:
    """Singular values, energy curve, energy ranks and status of each matrix, from one solve.

    The share of the energy in the r leading values is sum_{i<=r} s_i^2 / sum_i s_i^2, and the
    energy rank at a threshold is the least r whose share reaches it ([EM26], Figure 1). A share
    at most 1e-10 below a threshold counts as reaching it.

    Args:
        x: (..., N, D), floating.
        thresholds: T shares, above 0 and at most 1.

    Returns:
        A `Spectrum`. A zero matrix has ranks 0. A matrix with NaN or Inf has info 1, values NaN
        and ranks -1; the other matrices of the batch are unaffected.

    Raises:
        TypeError: `x` is not a real floating-point tensor, or a threshold is not a number.
        ValueError: `x` has fewer than two dimensions, or a threshold is out of range.
        RuntimeError: not enough memory for the scratch space.

    Notes:
        float32 and narrower inputs are solved in float32. A matrix whose curve passes within 1e-6
        of a threshold is solved again in float64, so that the ranks equal float64's. A singular
        value s of a float32 solve has an error of about 5e-7 s_1^2 / s; `svdvals` is more precise
        for small values. Only the values have a gradient. Results are bitwise repeatable.

    Examples:
        >>> import torch
        >>> found = spectrum(torch.diag(torch.tensor([3.0, 1.0, 0.0])), thresholds=(0.8, 0.95))
        >>> found.curve, found.ranks.tolist(), found.info.item()
        (tensor([0.9000, 1.0000, 1.0000]), [1, 2], 0)
    """
    _check_matrices("x", x)
    checks.check_shares("thresholds", thresholds)
    return spectrum_op.spectrum(x, tuple(thresholds), wide=False)


def energy_ranks(x: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Energy ranks: the least r with sum_{i<=r} s_i^2 >= t sum_i s_i^2 for each threshold t.

    Arguments, errors and notes: see `spectrum`.

    Returns:
        (..., T) int64: 0 for a zero matrix, -1 for one with NaN or Inf.

    Examples:
        >>> import torch
        >>> energy_ranks(torch.eye(10))
        tensor([ 8,  9, 10, 10])
    """
    return spectrum(x.detach() if isinstance(x, Tensor) else x, thresholds).ranks


def energy_curve(x: Tensor) -> Tensor:
    """Share of the energy in the r leading singular values, sum_{i<=r} s_i^2 / sum_i s_i^2.

    Arguments, errors and notes: see `spectrum`.

    Returns:
        (..., n), float64 for float64 and otherwise float32; zeros for a zero matrix.
        Differentiable through `svdvals`.

    Examples:
        >>> import torch
        >>> energy_curve(torch.diag(torch.tensor([3.0, 1.0])))
        tensor([0.9000, 1.0000])
    """
    _check_matrices("x", x)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return spectrum_op.spectrum(x, (), wide=False).curve
    values = svdvals(x)
    largest = values[..., :1].detach()
    energy = (values / torch.where(largest == 0, 1, largest)).square()
    total = energy.sum(-1, keepdim=True)
    return energy.cumsum(-1) / torch.where(total == 0, 1, total)


def svd(x: Tensor, k: int | None = None, *, method: Literal["auto", "jacobi"] = "auto") -> SVD:
    """Thin singular value decomposition, or its k leading triplets.

    Args:
        x: (..., N, D), floating; half precision is computed and returned as float32.
        k: number of triplets; None for all n.
        method: "auto", or "jacobi" for precise tiny values: one-sided Jacobi in float64.

    Returns:
        `SVD` of U (..., N, k), S (..., k) and Vh (..., k, D). With "auto", NaN for a matrix that
        contains NaN or Inf; the other matrices of the batch are unaffected.

    Raises:
        TypeError: `x` is not a real floating-point tensor, or k is neither None nor an int.
        ValueError: `x` has fewer than two dimensions, the method is unknown, or k is not from 1
            to n.
        RuntimeError: with "jacobi", a matrix contains NaN or Inf or does not converge. While a
            CUDA graph is captured nothing is raised; the results of such a matrix are NaN.

    Notes:
        "auto" with k=None is torch.linalg.svd, with its gradient. With k, the vectors of the
        smaller side are the leading eigenvectors of its Gram matrix in float64; those of the
        other side, X^T U / s, are orthonormalised. If x requires grad, torch.linalg.svd in
        float64 is used instead, with its gradient: it is slower, and signs may differ. "jacobi"
        has no gradient; it treats values below 1e-135 of the largest as zero.

        On a GPU, torch.linalg.svd loops over the batch and synchronises. The k leading vectors
        and "jacobi" process the whole batch at once and can be captured in a CUDA graph. The
        leading vectors of a matrix are NaN if Jacobi does not converge in 60 sweeps.

    Examples:
        >>> import torch
        >>> x = torch.outer(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0, 4.0]))
        >>> svd(x, k=1).S
        tensor([5.])
    """
    _check_matrices("x", x)
    smaller = min(x.shape[-2:])
    if method not in ("auto", "jacobi"):
        raise ValueError(f"method: expected 'auto' or 'jacobi', got {method!r}")
    if k is not None:
        _check_count("k", k, smaller)
    dtype = accumulation_dtype(x.dtype)
    if method == "jacobi":
        found = SVD(*jacobi_op.svd(x.detach()))
    else:
        backends.record(jacobi_op.NAME, "reference")
        if k is None:
            found = _by_torch(x.to(dtype))
        elif x.requires_grad and torch.is_grad_enabled():
            found = _by_torch(x.double())
        else:
            found = _leading(x, k)
    u, s, vh = (part.to(dtype) for part in found)
    return SVD(u[..., :k], s[..., :k], vh[..., :k, :])


def _by_torch(x: Tensor) -> SVD:
    clean, factor = reference.set_bad_aside(x)
    u, s, vh = torch.linalg.svd(clean, full_matrices=False)
    return _scaled(u, s, vh, factor)


def _scaled(u: Tensor, s: Tensor, vh: Tensor, factor: Tensor) -> SVD:
    each = factor[..., None]
    return SVD(u * each[..., None], s * each, vh * each[..., None])


def _leading(x: Tensor, k: int) -> SVD:
    """Computes the k leading triplets from the Gram matrix of the smaller side, in float64."""
    backend = jacobi_op.choose(x) if orthonormal.is_batched_only(x) else "reference"
    backends.record(jacobi_op.NAME, backend)
    tall = x.shape[-2] > x.shape[-1]
    clean, factor = reference.set_bad_aside(x.double())
    scale = _power_of_two(clean)  # the Gram matrix squares its input
    wide = (clean.mT if tall else clean) / scale
    gram = wide @ wide.mT
    if backend == "reference":
        near = torch.linalg.eigh(gram).eigenvectors[..., -k:].flip(-1)
    else:  # torch.linalg.eigh waits for the GPU and, up to torch 2.11, loops over the batch
        _, turns, converged = jacobi_op.turn(gram)
        near, factor = turns.mT[..., :k], factor * converged
    far = wide.mT @ near  # the columns have the lengths S
    lengths = torch.linalg.vector_norm(far, dim=-2)
    basis = orthonormal.orthonormal_columns(far, lengths <= _NOISE * lengths[..., :1])
    # beyond the matrix rank rounding decides the eigenvectors' order; the lengths differ from it
    values, order = (basis * far).sum(-2).abs().sort(dim=-1, descending=True, stable=True)
    near, far = (torch.take_along_dim(v, order.unsqueeze(-2), -1) for v in (near, basis))
    u, v = (far, near) if tall else (near, far)
    return _scaled(u, values * scale[..., 0], v.mT, factor)


def _power_of_two(x: Tensor) -> Tensor:
    """Largest power of two up to the largest element, (..., 1, 1); 1 for a zero matrix."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, largest / (2 * largest.frexp().mantissa), 1)


def principal_angles(v1: Tensor, v2: Tensor) -> Tensor:
    """Principal angles between the column spaces of two matrices, in radians, ascending.

    With orthonormal bases Q1 and Q2 the cosines are the singular values of Q1^T Q2 and the sines
    those of Q2 - Q1 Q1^T Q2. Each angle is computed from the better conditioned of the two (Bjorck
    and Golub, 1973).

    Args:
        v1: (..., D, k1), floating, of full column rank.
        v2: (..., D, k2), floating, of full column rank.

    Returns:
        (..., min(k1, k2)), float64 if an argument is float64 and otherwise float32. NaN for a pair
        that contains NaN or Inf; the other pairs are unaffected.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: the shapes don't match, or a matrix has more columns than rows.

    Examples:
        >>> import torch
        >>> v1, v2 = torch.eye(3)[:, :1], torch.tensor([[1.0], [1.0], [0.0]])
        >>> torch.rad2deg(principal_angles(v1, v2))
        tensor([45.])
    """
    _check_matrices("v1", v1)
    _check_matrices("v2", v2)
    if v1.shape[-2] != v2.shape[-2]:
        raise ValueError(f"v2: expected {v1.shape[-2]} rows as v1 has, got {tuple(v2.shape)}")
    for name, v in (("v1", v1), ("v2", v2)):
        if v.shape[-1] > v.shape[-2]:
            raise ValueError(
                f"{name}: expected at most as many columns as rows, got {tuple(v.shape)}"
            )
    small, large = (v1, v2) if v1.shape[-1] <= v2.shape[-1] else (v2, v1)
    (small, one), (large, other) = (reference.set_bad_aside(v.double()) for v in (small, large))
    q_small, q_large = (orthonormal.orthonormal_columns(v) for v in (small, large))
    shared = q_large.mT @ q_small
    cosines = _small_values(shared).clamp(max=1)
    sines = _small_values(q_small - q_large @ shared).flip(-1).clamp(max=1)
    angles = torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())
    dtype = torch.promote_types(*(accumulation_dtype(v.dtype) for v in (v1, v2)))
    return (angles * (one * other)[..., None]).to(dtype)


def _small_values(x: Tensor) -> Tensor:
    """Singular values with an error of 1e-16 of the largest; a Gram matrix would lose half."""
    differentiable = x.requires_grad and torch.is_grad_enabled()
    batched = orthonormal.is_batched_only(x) and not differentiable
    if batched and jacobi_op.choose(x) != "reference":
        return jacobi_op.svdvals(x)
    values: Tensor = torch.linalg.svdvals(x)
    return values


def _check_matrices(name: str, x: Tensor) -> None:
    checks.check_floating(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name}: expected at least 2 dimensions, got shape {tuple(x.shape)}")


def _check_count(name: str, value: object, most: int) -> None:
    expected = f"{name}: expected None or an int from 1 to {most}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(expected)
    if not 1 <= int(value) <= most:
        raise ValueError(expected)
