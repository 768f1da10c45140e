"""Batched singular values, energy ranks and subspaces of small matrices, such as feature maps.

Shapes: any leading batch dimensions, then N tokens and D channels; n = min(N, D). The compiled
library of csrc/ runs where the smaller side is from 1 to 512, on a CPU with one matrix a thread;
torch.linalg runs else, and `featkd.last_backend("spectrum")`, or "svd", says which. Nothing here
writes to its input. docs/linalg.md has the algorithm and how it was shown to be right.
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
_NOISE = 2.0**-40  # of the largest: a vector this short holds nothing but roundings


class SVD(NamedTuple):
    """X = U diag(S) Vh, as torch.linalg.svd has it.

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
        (..., n), float64 for float64 and else float32. NaN, as is the gradient, for a matrix that
        holds NaN or Inf.

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: fewer than two dimensions.
        RuntimeError: too little memory for the scratch space.

    Notes:
        Computed in float64 whatever the dtype: values of float32 matrices are good to float32's
        rounding of the largest. For float64 matrices the error of a value s is about
        1e-16 s_1^2 / s: tiny values are better taken from `svd` by Jacobi. Differentiable, twice
        too; the gradient takes torch.linalg.svd. Repeats bitwise.

    Example:
        >>> import torch
        >>> svdvals(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
        tensor([4., 3.])
    """
    _check_matrices("x", x)
    return spectrum_op.spectrum(x, (), wide=True).values


def spectrum(x: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Spectrum:
    """Singular values, energies and ranks of one solve, and how it went.

    The share of the energy in the r leading values is sum_{i<=r} s_i^2 / sum_i s_i^2, and the
    energy rank at a threshold the least r whose share reaches it ([EM26], Figure 1). A share
    within 1e-10 below a threshold reaches it.

    Args:
        x: (..., N, D), floating.
        thresholds: T shares, above 0 and at most 1.

    Returns:
        A `Spectrum`; its fields say more. A zero matrix has ranks 0. A matrix with NaN or Inf has
        info 1, values NaN and ranks -1, and the others are as they would be without it.

    Raises:
        TypeError: not a real floating-point tensor, or a threshold that is no number.
        ValueError: fewer than two dimensions, or a threshold out of range.
        RuntimeError: too little memory for the scratch space.

    Notes:
        float32 and narrower inputs are solved in float32, and once more in float64 where a
        threshold is within 1e-6 of a step of the curve, so that ranks are float64's. A value s of
        theirs is good to 5e-7 s_1^2 / s only: `svdvals` has small ones better. The values alone
        have a gradient. Repeats bitwise.

    Example:
        >>> import torch
        >>> found = spectrum(torch.diag(torch.tensor([3.0, 1.0, 0.0])), thresholds=(0.8, 0.95))
        >>> found.curve, found.ranks.tolist(), found.info.item()
        (tensor([0.9000, 1.0000, 1.0000]), [1, 2], 0)
    """
    _check_matrices("x", x)
    checks.check_shares("thresholds", thresholds)
    return spectrum_op.spectrum(x, tuple(thresholds), wide=False)


def energy_ranks(x: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Energy ranks: the least r with sum_{i<=r} s_i^2 >= t sum_i s_i^2 at each threshold t.

    Args, errors and notes are those of `spectrum`.

    Returns:
        (..., T) int64: 0 for a zero matrix, -1 for one with NaN or Inf.

    Example:
        >>> import torch
        >>> energy_ranks(torch.eye(10))
        tensor([ 8,  9, 10, 10])
    """
    return spectrum(x.detach() if isinstance(x, Tensor) else x, thresholds).ranks


def energy_curve(x: Tensor) -> Tensor:
    """Share of the energy in the r leading singular values, sum_{i<=r} s_i^2 / sum_i s_i^2.

    Args, errors and notes are those of `spectrum`.

    Returns:
        (..., n), float64 for float64 and else float32; zeros for a zero matrix. Differentiable,
        by way of `svdvals`.

    Example:
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
    """Singular value decomposition, thin, or its k leading vectors.

    Args:
        x: (..., N, D), floating; half precision is computed and returned as float32.
        k: how many; None for all n.
        method: "auto", or "jacobi" for tiny values: one-sided Jacobi in float64.

    Returns:
        `SVD` of U (..., N, k), S (..., k) and Vh (..., k, D). With "auto", NaN for a matrix that
        holds NaN or Inf; the others are as they would be without it.

    Raises:
        TypeError: not a real floating-point tensor, or k neither None nor an int.
        ValueError: fewer than two dimensions, an unknown method, or k not from 1 to n.
        RuntimeError: "jacobi" and NaN or Inf, or no convergence. While a CUDA graph is captured
            nothing is raised; those matrices' results are NaN.

    Notes:
        With "auto" all vectors come from torch.linalg.svd, with its gradient. The k leading ones
        come from the eigenvectors of the smaller side's Gram matrix in float64; the other side's
        vectors, X^T U / s, are orthonormalised. Where x requires grad, they are those of
        torch.linalg.svd in float64, with its gradient: slower, and signs may differ. Those of
        "jacobi" carry none; it takes values below 1e-135 of the largest for zeros.

        On a GPU torch.linalg.svd takes one matrix after the other and waits for the GPU. The k
        leading vectors and "jacobi" take the whole batch at once, and a CUDA graph can capture
        them. The leading vectors are NaN there where Jacobi does not converge in 60 sweeps.

    Example:
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
    """The k leading singular triplets by the Gram matrix of the smaller side, in float64."""
    backend = jacobi_op.choose(x) if orthonormal.is_batched_only(x) else "reference"
    backends.record(jacobi_op.NAME, backend)
    tall = x.shape[-2] > x.shape[-1]
    clean, factor = reference.set_bad_aside(x.double())
    scale = _power_of_two(clean)  # the Gram matrix squares what it gets
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
    # beyond the matrix rank the eigenvectors' order is rounding's, and the lengths have another
    values, order = (basis * far).sum(-2).abs().sort(dim=-1, descending=True, stable=True)
    near, far = (torch.take_along_dim(v, order.unsqueeze(-2), -1) for v in (near, basis))
    u, v = (far, near) if tall else (near, far)
    return _scaled(u, values * scale[..., 0], v.mT, factor)


def _power_of_two(x: Tensor) -> Tensor:
    """(..., 1, 1): the greatest that the largest element reaches, and 1 for a zero matrix."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, largest / (2 * largest.frexp().mantissa), 1)


def principal_angles(v1: Tensor, v2: Tensor) -> Tensor:
    """Principal angles between the column spaces of two matrices, in radians, ascending.

    With orthonormal bases Q1 and Q2 the cosines are the singular values of Q1^T Q2 and the sines
    those of Q2 - Q1 Q1^T Q2; each angle is taken from the one that is well conditioned (Bjorck and
    Golub, 1973).

    Args:
        v1: (..., D, k1), floating, of full column rank.
        v2: (..., D, k2), floating, of full column rank.

    Returns:
        (..., min(k1, k2)), float64 where an argument is float64 and else float32. NaN where v1 or
        v2 holds NaN or Inf; the other pairs' are as they would be without it.

    Raises:
        TypeError: not real floating-point tensors.
        ValueError: other shapes, or more columns than rows.

    Example:
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
    """Singular values good to 1e-16 of the largest, which those by a Gram matrix are not."""
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
