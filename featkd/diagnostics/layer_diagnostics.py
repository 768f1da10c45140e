"""Diagnostics of one layer, accumulated in one pass over its feature maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featkd.diagnostics import null_models
from featkd.diagnostics.accumulator import Accumulator
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


class LayerDiagnostics(Accumulator):
    """Accumulates the diagnostics of one layer that need only one pass.

    Args:
        settings: definitions and sample sizes of the figures.

    Examples:
        >>> from featkd.diagnostics import Settings
        >>> stats = LayerDiagnostics(Settings(sample=2, permutations=5))
        >>> features = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(0))
        >>> stats.update(features[:3]), stats.update(features[3:])
        (None, None)
        >>> result = stats.result()
        >>> result.images, result.spectrum.summaries[0].percentile99
        (4, 5)
    """

    _parts = ("_spectrum", "_pca", "_sep", "_sample", "_seen")

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._spectrum = SpectrumStats(self.settings.thresholds)
        self._pca = DatasetPCA()
        self._sep = SEP()
        self._sample = FeatureSample(self.settings.sample, self.settings.seed)
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
        self._keep_shape("features", tuple(features.shape[1:]))
        self._spectrum.update(features, images)
        self._pca.update(features)
        self._sep.update(features)
        self._sample.update(features, images)
        self._seen += len(features)

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
