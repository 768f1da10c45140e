"""Subspace rotation: overlap of the images' leading subspaces, and with the data set's axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featkd import linalg
from featkd.diagnostics.pca import PCAResult

_RANK_TOLERANCE = 1e-6  # relative to the largest singular value, near float32's accuracy
_ANGLE_PAIRS = 128  # pairs of images whose principal angles are averaged


@dataclass(frozen=True)
class RotationResult:
    """Overlap of M sampled images' subspaces, spanned by k leading right singular vectors.

    The overlap of two subspaces is (1/k) sum cos^2 of their principal angles: 1 for equal
    subspaces, k/D on average for random ones.

    Attributes:
        k: dimensions of the subspaces, at most the images' median rank.
        images: (M,) int64 image indices.
        left_out: number of sampled images whose rank is below k.
        overlap: (M, M) float64, between the images.
        overlap_dataset: (M,) float64, with the k leading axes of the data set.
        pair_mean, pair_std: `overlap` over the pairs of different images.
        dataset_mean, dataset_std: `overlap_dataset` over the images.
        random: k / D, the expectation for random subspaces.
        angles_deg: (k,) float64, mean principal angles between different images, in degrees.
        random_angles_deg: (k,) float64, the same between random subspaces.
    """

    k: int
    images: Tensor
    left_out: int
    overlap: Tensor
    overlap_dataset: Tensor
    pair_mean: float
    pair_std: float
    dataset_mean: float
    dataset_std: float
    random: float
    angles_deg: Tensor
    random_angles_deg: Tensor


def measure_rotation(
    features: Tensor, images: Tensor, pca: PCAResult, k: int, seed: int = 0
) -> RotationResult:
    """Compares the leading subspaces of some images.

    Args:
        features: (M, N, D), M >= 2.
        images: (M,) int64 image indices.
        pca: axes of the data set.
        k: maximum dimensions; the images' median rank is used if it is lower.
        seed: random seed of the random subspaces.

    Raises:
        ValueError: fewer than two images have k dimensions.
    """
    d = features.shape[2]
    values = linalg.svdvals(features.double())
    ranks = (values > _RANK_TOLERANCE * values[:, :1]).sum(1)
    k = min(k, int(ranks.median()))  # further directions would be arbitrary
    full_rank = ranks >= max(1, k)
    left_out = len(features) - int(full_rank.sum())
    features, images = features[full_rank], images[full_rank]
    if len(features) < 2:
        raise ValueError(
            f"features: expected at least 2 images of rank {max(1, k)} or more, got {len(features)}"
        )
    bases = linalg.svd(features.double(), k).Vh  # (M, k, D)
    overlap = _overlaps(bases)
    with_dataset = (bases @ pca.vectors[:, :k].to(bases)).square().sum((1, 2)) / k
    first, second = torch.triu_indices(len(features), len(features), 1)
    pairs = overlap[first, second]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(first), generator=generator)[:_ANGLE_PAIRS]
    random = torch.randn(2, 32, d, k, generator=generator, dtype=torch.float64)
    return RotationResult(
        k=k,
        images=images,
        left_out=left_out,
        overlap=overlap,
        overlap_dataset=with_dataset,
        pair_mean=float(pairs.mean()),
        pair_std=float(pairs.std(unbiased=False)),
        dataset_mean=float(with_dataset.mean()),
        dataset_std=float(with_dataset.std(unbiased=False)),
        random=k / d,
        angles_deg=_mean_angles(bases[first[chosen]].mT, bases[second[chosen]].mT),
        random_angles_deg=_mean_angles(random[0], random[1]),
    )


def _overlaps(bases: Tensor) -> Tensor:
    """Overlaps (M, M) of orthonormal rows (M, k, D).

    A loop over the images needs M k^2 numbers; all cosines at once would be (M k)^2.
    """
    m, k, _ = bases.shape
    overlap = bases.new_zeros((m, m))
    for image, own in enumerate(bases):
        cosines = bases[image:] @ own.T
        overlap[image, image:] = cosines.square_().sum((1, 2)) / k
    return overlap.triu() + overlap.triu(1).T


def _mean_angles(v1: Tensor, v2: Tensor) -> Tensor:
    return torch.rad2deg(linalg.principal_angles(v1, v2)).mean(0)
