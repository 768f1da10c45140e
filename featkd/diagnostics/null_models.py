"""Null models of the figures: Gaussian maps and tokens, permuted channels; token bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featkd.diagnostics.scaling import safe_scale
from featkd.diagnostics.singular_spectrum import SpectrumResult, SpectrumStats
from featkd.diagnostics.spectral_energy_pattern import (
    SEP,
    SHARES,
    SEPResult,
    cumulative_moments,
    first_reaching,
)
from featkd.ops import reference


def gaussian_tokens(channels: int, seed: int = 0, tokens: int = 4096) -> Tensor:
    """Standard normal tokens (tokens, channels), float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator)


def gaussian_sep(channels: int, shares: Sequence[float] = SHARES, seed: int = 0) -> SEPResult:
    """SEP of Gaussian tokens, which does not depend on their scale."""
    stats = SEP()
    stats.update(gaussian_tokens(channels, seed))
    return stats.result(shares)


def gaussian_spectrum(
    tokens: int, channels: int, thresholds: Sequence[float], seed: int = 0, images: int = 8
) -> SpectrumResult:
    """Energy ranks and curve of Gaussian maps (tokens, channels)."""
    stats = SpectrumStats(thresholds)
    maps = gaussian_tokens(channels, seed, images * tokens).reshape(images, tokens, channels)
    stats.update(maps, torch.arange(images))
    return stats.result()


@dataclass(frozen=True)
class PermutationResult:
    """SEP of a sample of images, and of the same sample with its channels in random orders.

    Attributes:
        shares: the S shares of energy.
        images: number of images with nonzero features.
        permutations: number of random orders, each applied to all tokens.
        observed: (S,) d/D in the channels' own order.
        low, high: (S,) 2.5th and 97.5th percentile of `observed` over bootstraps of the images.
        permuted_mean, permuted_low, permuted_high: (S,) mean, 2.5th and 97.5th percentile of d/D
            over the random orders.
        p_value: (S,) share of the orders, the observed one included, whose distance from the
            random orders' mean is at least the observed distance.
        p_joint: p-value of the largest distance over all shares, each in units of its standard
            deviation over the orders. It needs no correction for the number of shares.
        permuted_curve: (D,) float64, mean curve over the random orders.
    """

    shares: tuple[float, ...]
    images: int
    permutations: int
    observed: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    permuted_mean: tuple[float, ...]
    permuted_low: tuple[float, ...]
    permuted_high: tuple[float, ...]
    p_value: tuple[float, ...]
    p_joint: float
    permuted_curve: Tensor


def permutation_test(
    features: Tensor,
    permutations: int = 100,
    bootstraps: int = 200,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> PermutationResult:
    """Tests if SEP depends on the order of the channels.

    Args:
        features: (M, N, D), maps of a sample of images.
        permutations: number of random orders of the channels.
        bootstraps: number of resamples of the images, for the interval of the observed figure.
        shares: shares of energy.
        seed: random seed of the orders and resamples.

    Raises:
        ValueError: all features are zero.
    """
    d = features.shape[2]
    x = (features * safe_scale(features)).float()
    generator = torch.Generator().manual_seed(seed)
    per_image = [_mean_curve(image) for image in x]
    curves, tokens = (torch.stack(part) for part in zip(*per_image, strict=True))  # (M, D), (M,)
    curves, tokens = curves[tokens > 0], tokens[tokens > 0]
    if not len(curves):
        raise ValueError("features: all of them are zero")
    observed = _relative(_mean_curve(x)[0].unsqueeze(0), shares)[0]
    picks = torch.randint(len(curves), (bootstraps, len(curves)), generator=generator)
    weights = tokens[picks].double()  # a resample is a mean over tokens, as `observed` is
    weights /= weights.sum(1, keepdim=True)
    boot = _relative((weights.unsqueeze(1) @ curves[picks]).squeeze(1), shares)
    orders = [torch.randperm(d, generator=generator) for _ in range(permutations)]
    permuted_curves = torch.stack([_mean_curve(x[..., order])[0] for order in orders])
    permuted = _relative(permuted_curves, shares)
    center = permuted.mean(0)
    scale = permuted.std(0, unbiased=False) + 1 / d  # d/D changes in steps of 1/D
    largest = ((permuted - center).abs() / scale).amax(1)
    joint = int((largest >= ((observed - center).abs() / scale).max() - 1e-12).sum())
    as_far = (permuted - center).abs() >= (observed - center).abs() - 1e-12
    return PermutationResult(
        shares=tuple(shares),
        images=len(curves),
        permutations=permutations,
        observed=_floats(observed),
        low=_floats(boot.quantile(0.025, dim=0)),
        high=_floats(boot.quantile(0.975, dim=0)),
        permuted_mean=_floats(center),
        permuted_low=_floats(permuted.quantile(0.025, dim=0)),
        permuted_high=_floats(permuted.quantile(0.975, dim=0)),
        p_value=_floats((1 + as_far.sum(0)) / (1 + permutations)),
        p_joint=(1 + joint) / (1 + permutations),
        permuted_curve=permuted_curves.mean(0),
    )


def _mean_curve(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cumulative share (D,) over the nonzero tokens of (..., D), and their number.

    The shares are NaN if all tokens are zero.
    """
    d = features.shape[-1]
    sums, zero = cumulative_moments(features.reshape(-1, d))
    tokens = features.numel() // d - zero
    c = sums[0] / tokens
    return torch.cat([c, (1 + c[0] - c[: d - len(c)]).flip(0)]), tokens


def _relative(curves: Tensor, shares: Sequence[float]) -> Tensor:
    """Figures d/D (R, S) of curves (R, D)."""
    found = [first_reaching(curve, shares) for curve in curves]
    return torch.tensor(found, dtype=torch.float64) / curves.shape[1]


def _floats(x: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in x)


@dataclass(frozen=True)
class BandwidthResult:
    """Share of its channels that a token uses, independent of their order.

    Attributes:
        participation_mean, participation_std: participation ratio, (sum x^2)^2 / (D sum x^4): 1
            for equal energies in all channels, 1/D for all energy in one.
        channels90_mean, channels90_std: smallest share of the channels that holds 90 % of the
            energy.
        tokens: number of nonzero tokens.
    """

    participation_mean: float
    participation_std: float
    channels90_mean: float
    channels90_std: float
    tokens: int


def bandwidth(features: Tensor) -> BandwidthResult:
    """Bandwidth of the nonzero tokens of (..., D).

    Raises:
        ValueError: all of them are zero.
    """
    tokens = features.reshape(-1, features.shape[-1]).double()
    tokens = tokens[tokens.abs().amax(1) > 0]
    if not len(tokens):
        raise ValueError("features: all of them are zero")
    d = tokens.shape[1]
    energy = (tokens / tokens.abs().amax(1, keepdim=True)).square()
    energy /= energy.sum(1, keepdim=True)
    participation = 1 / (d * energy.square().sum(1))
    held = energy.sort(1, descending=True).values.cumsum(1)
    needed = reference.first_reaching(held, held.new_tensor([0.9])).squeeze(1) / d
    return BandwidthResult(
        participation_mean=float(participation.mean()),
        participation_std=float(participation.std(unbiased=False)),
        channels90_mean=float(needed.double().mean()),
        channels90_std=float(needed.double().std(unbiased=False)),
        tokens=len(tokens),
    )
