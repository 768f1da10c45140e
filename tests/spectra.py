"""Matrices with spectra that are hard for energy ranks, and their LAPACK results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = (0.8, 0.9, 0.95, 0.99, 0.999)
Rng = np.random.Generator


def with_values(values: np.ndarray, rows: int, columns: int, rng: Rng) -> np.ndarray:
    """Matrix with the given singular values and random singular vectors."""
    left, _ = np.linalg.qr(rng.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((columns, len(values))))
    return (left * values) @ right.T


def dominated(share: float) -> Callable[[int, int, Rng], np.ndarray]:
    """Family in which one mode has `share` of the energy, and the others have equal parts."""

    def make(rows: int, columns: int, rng: Rng) -> np.ndarray:
        n = min(rows, columns)
        rest = (1 - share) / max(n - 1, 1)
        return with_values(np.sqrt([share] + [rest] * (n - 1)), rows, columns, rng)

    return make


def geometric(rows: int, columns: int, rng: Rng) -> np.ndarray:
    return with_values(0.9 ** np.arange(min(rows, columns)), rows, columns, rng)


def graded(rows: int, columns: int, rng: Rng) -> np.ndarray:
    """Singular values over twelve orders of magnitude."""
    return with_values(np.logspace(0, -12, min(rows, columns)), rows, columns, rng)


def flat(rows: int, columns: int, rng: Rng) -> np.ndarray:
    return with_values(np.ones(min(rows, columns)), rows, columns, rng)


def low_rank(rows: int, columns: int, rng: Rng) -> np.ndarray:
    """Product of small integers with exact rank 3."""
    k = min(3, rows, columns)
    return rng.integers(-3, 4, (rows, k)) @ rng.integers(-3, 4, (k, columns)).astype(float)


def repeated(rows: int, columns: int, rng: Rng) -> np.ndarray:
    """Four different singular values, each repeated."""
    n = min(rows, columns)
    return with_values(np.sort(np.arange(n) % 4 + 1.0)[::-1], rows, columns, rng)


def diagonal(rows: int, columns: int, rng: Rng) -> np.ndarray:
    """Matrix with a diagonal Gram matrix and repeated entries."""
    x = np.zeros((rows, columns))
    n = min(rows, columns)
    x[np.arange(n), np.arange(n)] = rng.integers(0, 3, n)
    x[0, 0] = 2
    return x


def bidiagonal(rows: int, columns: int, rng: Rng) -> np.ndarray:
    """Matrix with a tridiagonal Gram matrix."""
    return diagonal(rows, columns, rng) + np.eye(rows, columns, 1)


def constant_tokens(rows: int, columns: int, rng: Rng) -> np.ndarray:
    return np.ones((rows, 1)) * rng.standard_normal((1, columns))


def duplicate_tokens(rows: int, columns: int, rng: Rng) -> np.ndarray:
    return rng.standard_normal((rows, columns))[np.arange(rows) // 2]


def zero_column(rows: int, columns: int, rng: Rng) -> np.ndarray:
    x = rng.standard_normal((rows, columns))
    x[:, ::3] = 0
    x[rows // 2] = 0
    return x


def zero(rows: int, columns: int, rng: Rng) -> np.ndarray:
    return np.zeros((rows, columns))


def features(rows: int, columns: int, rng: Rng) -> np.ndarray:
    """Matrix like a ViT feature map: a strong common part, and channels of unequal scale."""
    scales = np.exp(rng.standard_normal(columns))
    n = min(rows, columns)
    smooth = with_values(1 / np.arange(1, n + 1), rows, columns, rng)
    return (30 * smooth + rng.standard_normal((1, columns))) * scales


def tiny(rows: int, columns: int, rng: Rng) -> np.ndarray:
    return 1e-20 * features(rows, columns, rng)


def huge(rows: int, columns: int, rng: Rng) -> np.ndarray:
    return 1e20 * features(rows, columns, rng)


FAMILIES: dict[str, Callable[[int, int, Rng], np.ndarray]] = {
    "dominated 0.8": dominated(0.8),
    "dominated 0.99": dominated(0.99),
    **{
        f.__name__: f
        for f in (
            *(geometric, graded, flat, low_rank, repeated, diagonal, bidiagonal),
            *(constant_tokens, duplicate_tokens, zero_column, zero, features, tiny, huge),
        )
    },
}


@dataclass(frozen=True)
class Expected:
    """Results of float64 LAPACK: values (B, n), curve (B, n), ranks (B, T)."""

    values: np.ndarray
    curve: np.ndarray
    ranks: np.ndarray


def lapack(x: np.ndarray, thresholds: tuple[float, ...] = THRESHOLDS) -> Expected:
    """Computes the results for matrices (B, N, D); docs/linalg.md defines the ranks."""
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    largest = values[:, :1]
    energy = (values / np.where(largest > 0, largest, 1)) ** 2
    total = energy.sum(1, keepdims=True)
    curve = np.cumsum(energy, 1) / np.where(total > 0, total, 1)
    reached = curve[:, :, None] >= np.array(thresholds) - 1e-10
    ranks = np.where(total > 0, reached.argmax(1) + 1, 0)
    return Expected(values, curve, ranks)


def matrices(family: str, rows: int, columns: int, count: int = 2) -> Tensor:
    """Matrices (count, rows, columns) in float64, the same in each call."""
    rng = np.random.default_rng([rows, columns, *family.encode()])
    return torch.from_numpy(np.stack([FAMILIES[family](rows, columns, rng) for _ in range(count)]))


def svd_errors(x: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> tuple[float, float, float]:
    """Errors of all singular values, of orthonormality, and of U S Vh, for x in float64.

    The first and the last one are relative to the largest singular value of each matrix.
    """
    values = torch.from_numpy(lapack(x.numpy()).values)
    largest = values[:, :1].clamp_min(1e-300)
    eye = torch.eye(s.shape[-1], dtype=s.dtype)
    gaps = torch.stack([(part.mT @ part - eye).abs().max() for part in (u, vh.mT)])
    product = ((u * s.unsqueeze(-2)) @ vh - x).abs().amax((1, 2)) / largest[:, 0]
    return float(((s - values).abs() / largest).max()), float(gaps.max()), float(product.max())
