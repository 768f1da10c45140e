"""Diagnostics of one layer, accumulated in one pass over its feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featkd.diagnostics import null_models
from featkd.diagnostics.config import Settings
from featkd.diagnostics.feature_sample import FeatureSample
from featkd.diagnostics.pca import CapturedResult, DatasetPCA, PCAResult
from featkd.diagnostics.singular_spectrum import SpectrumResult, SpectrumStats
from featkd.diagnostics.spectral_energy_pattern import SEP, SEPResult
from featkd.diagnostics.subspace_rotation import RotationResult, measure_rotation
from featkd.runtime import checks


@dataclass(frozen=True)
class LayerResult:
    """Figures of one layer.

    Attributes:
        tokens, channels: N and D of its maps.
        images: number of images.
        spectrum: energy ranks of the images.
        pca: axes of the data set.
        sep: spectral energy pattern.
        gaussian: SEP of Gaussian tokens.
        gaussian_spectrum: energy ranks of Gaussian maps of N tokens.
        permutation: SEP of permuted channels, over images of the sample.
        rotation: subspace rotation over the sample; None for a sample of one image.
        bandwidth, gaussian_bandwidth: channels used per token, over the sample, and for Gaussian
            tokens.
        captured: each image's energy in the axes of the data set, from the second pass, or None.
    """

    tokens: int
    channels: int
    images: int
    spectrum: SpectrumResult
    pca: PCAResult
    sep: SEPResult
    gaussian: SEPResult
    gaussian_spectrum: SpectrumResult
    permutation: null_models.PermutationResult
    rotation: RotationResult | None
    bandwidth: null_models.BandwidthResult
    gaussian_bandwidth: null_models.BandwidthResult
    captured: CapturedResult | None = None


class LayerDiagnostics:
    """Accumulates the diagnostics of one layer that need only one pass.

    Args:
        settings: definitions and sample sizes of the figures.

    Example:
        >>> from featkd.diagnostics import Settings
        >>> stats = LayerDiagnostics(Settings(sample=2, permutations=5))
        >>> features = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(0))
        >>> stats.update(features[:3]), stats.update(features[3:])
        (None, None)
        >>> result = stats.result()
        >>> result.images, result.spectrum.summaries[0].percentile99
        (4, 5)
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._spectrum = SpectrumStats(self.settings.thresholds)
        self._pca = DatasetPCA()
        self._sep = SEP()
        self._sample = FeatureSample(self.settings.sample, self.settings.seed)
        self._shape: tuple[int, int] | None = None
        self._seen = 0

    def calibrate(self, features: Tensor) -> None:
        """Sets the PCA's pilot mean from maps (B, N, D); see `DatasetPCA.calibrate`."""
        self._pca.calibrate(features)

    def update(self, features: Tensor, images: Tensor | None = None) -> None:
        """Adds the maps of some images.

        Args:
            features: (B, N, D), floating and finite.
            images: (B,) int64 indices in the data set; by default the next ones.

        Raises:
            ValueError: N or D differs from the previous maps, or the features hold NaN or Inf.
        """
        checks.check_floating("features", features, ("B", *(self._shape or ("N", "D"))))
        if images is None:
            images = torch.arange(self._seen, self._seen + len(features))
        checks.check_shape("images", images, (len(features),))
        if not len(features):
            return
        checks.check_not_empty("features", features)
        if not torch.isfinite(features).all():
            raise ValueError("features: hold NaN or Inf; leave such images out")
        self._shape = (features.shape[1], features.shape[2])
        features = features.detach()
        self._spectrum.update(features, images)
        self._pca.update(features)
        self._sep.update(features)
        self._sample.update(features, images)
        self._seen += len(features)

    def merge(self, other: LayerDiagnostics) -> None:
        """Adds the images of an accumulator with the same settings; no image may be in both."""
        if other._shape is None:
            return
        if self._shape is not None and self._shape != other._shape:
            raise ValueError(f"other: expected maps of {self._shape}, got {other._shape}")
        self._spectrum.merge(other._spectrum)
        self._pca.merge(other._pca)
        self._sep.merge(other._sep)
        self._sample.merge(other._sample)
        self._shape = other._shape
        self._seen += other._seen

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which torch.load(weights_only=True) accepts."""
        parts: dict[str, Any] = {name: part.state_dict() for name, part in self._parts()}
        return {"shape": self._shape, "seen": self._seen, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of the same settings."""
        self._shape, self._seen = state["shape"], state["seen"]
        for name, part in self._parts():
            part.load_state_dict(state[name])

    def _parts(self) -> tuple[tuple[str, Any], ...]:
        return (
            ("spectrum", self._spectrum),
            ("pca", self._pca),
            ("sep", self._sep),
            ("sample", self._sample),
        )

    @property
    def images(self) -> int:
        """Number of images so far."""
        return self._seen

    def pca(self) -> PCAResult:
        """Axes of the tokens so far, for the second pass."""
        return self._pca.result(self.settings.centred)

    def result(self) -> LayerResult:
        """Figures over the images so far.

        Raises:
            ValueError: no image was added, or all features are zero.
        """
        if self._shape is None:
            raise ValueError("features: no image was added")
        settings, (tokens, channels) = self.settings, self._shape
        gaussian = null_models.gaussian_tokens(channels, settings.seed)
        pca = self.pca()
        spectrum = self._spectrum.result()
        typical_rank = max(1, round(spectrum.summaries[spectrum.typical].median))
        images, features = self._sample.result()
        return LayerResult(
            tokens=tokens,
            channels=channels,
            images=self._seen,
            spectrum=spectrum,
            pca=pca,
            sep=self._sep.result(settings.shares),
            gaussian=null_models.gaussian_sep(channels, settings.shares, settings.seed),
            gaussian_spectrum=null_models.gaussian_spectrum(
                tokens, channels, settings.thresholds, settings.seed
            ),
            permutation=null_models.permutation_test(
                self._sample.first(settings.permuted),
                settings.permutations,
                shares=settings.shares,
                seed=settings.seed,
            ),
            rotation=None
            if len(images) < 2
            else measure_rotation(features, images, pca, settings.k or typical_rank, settings.seed),
            bandwidth=null_models.bandwidth(features),
            gaussian_bandwidth=null_models.bandwidth(gaussian),
        )
