"""One layer's diagnostics from one stream of feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featkd import linalg
from featkd.diagnostics import nulls
from featkd.diagnostics.pca import CapturedResult, DatasetPCA, PCAResult
from featkd.diagnostics.sample import FeatureSample
from featkd.diagnostics.sep import SEP, SHARES, SEPResult
from featkd.diagnostics.spectrum import SpectrumResult, SpectrumStats
from featkd.diagnostics.subspace import RotationResult, rotation
from featkd.runtime import checks


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        thresholds: shares of energy for ranks and dimensions.
        shares: shares of energy for SEP.
        sample: images whose features are kept, for rotation, bandwidth and permutations.
        permuted: images among them that the permutation test uses.
        permutations: random orders of the channels.
        k: dimensions of the subspaces that are compared; None for the median energy rank at the
            threshold nearest to 0.9.
        centred: subtract the data set's mean token for the PCA.
        seed: of the sample, the permutations and the Gaussian tokens.

    Raises:
        ValueError: a field is out of its range.
    """

    thresholds: tuple[float, ...] = linalg.THRESHOLDS
    shares: tuple[float, ...] = SHARES
    sample: int = 64
    permuted: int = 16
    permutations: int = 100
    k: int | None = None
    centred: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("thresholds", "shares"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name}: expected at least one share, got none")
            checks.check_shares(name, values)
        for name, least in (("sample", 2), ("permuted", 1), ("permutations", 1), ("k", 1)):
            value = getattr(self, name)
            if name == "k" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 <= seed < 2**63, got {self.seed}")


@dataclass(frozen=True)
class LayerResult:
    """All that one pass over the images says about a layer; a second pass fills in `captured`.

    Attributes:
        tokens, channels: N and D of its maps.
        images: how many images.
        spectrum, pca, sep: see their modules.
        gaussian: SEP of Gaussian tokens.
        gaussian_spectrum: spectra of Gaussian maps of N tokens.
        permutation: SEP of permuted channels, over some images of the sample.
        rotation: over the sample; None for one image.
        bandwidth, gaussian_bandwidth: over the sample, and of Gaussian tokens.
        captured: of the second pass, or None.
    """

    tokens: int
    channels: int
    images: int
    spectrum: SpectrumResult
    pca: PCAResult
    sep: SEPResult
    gaussian: SEPResult
    gaussian_spectrum: SpectrumResult
    permutation: nulls.PermutationResult
    rotation: RotationResult | None
    bandwidth: nulls.BandwidthResult
    gaussian_bandwidth: nulls.BandwidthResult
    captured: CapturedResult | None = None


class LayerDiagnostics:
    """Accumulates all diagnostics of one layer that need one pass.

    Args:
        settings: what is measured.
        compiled: run the elementwise and FFT parts through torch.compile.

    Example:
        >>> stats = LayerDiagnostics(Settings(sample=2, permutations=5))
        >>> features = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(0))
        >>> stats.update(features[:3]), stats.update(features[3:])
        (None, None)
        >>> found = stats.result()
        >>> found.images, found.spectrum.summaries[0].percentile99
        (4, 5)
    """

    def __init__(self, settings: Settings | None = None, compiled: bool = False) -> None:
        self.settings = settings or Settings()
        self._spectrum = SpectrumStats(self.settings.thresholds)
        self._pca = DatasetPCA()
        self._sep = SEP(compiled)
        self._sample = FeatureSample(self.settings.sample, self.settings.seed)
        self._shape: tuple[int, int] | None = None
        self._seen = 0

    def calibrate(self, features: Tensor) -> None:
        """Take the PCA's pilot from (B, N, D); see `DatasetPCA.calibrate`."""
        self._pca.calibrate(features)

    def update(self, features: Tensor, images: Tensor | None = None) -> None:
        """Add the maps of some images.

        Args:
            features: (B, N, D), floating and finite.
            images: (B,) int64 indices in the data set; by default they go on counting.

        Raises:
            ValueError: another shape than before, or NaN or Inf among the features.
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
        """Take over what `other`, with the same settings, has seen; the images must be others."""
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
        """Tensors and plain values, as torch.load takes them with weights_only."""
        parts: dict[str, Any] = {name: part.state_dict() for name, part in self._parts()}
        return {"shape": self._shape, "seen": self._seen, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same settings."""
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
        """Images so far."""
        return self._seen

    def pca(self) -> PCAResult:
        """The axes of the tokens so far, which a second pass needs."""
        return self._pca.result(self.settings.centred)

    def result(self) -> LayerResult:
        """All figures over the images so far.

        Raises:
            ValueError: no image came, or all features are zero.
        """
        if self._shape is None:
            raise ValueError("features: no image came")
        settings, (tokens, channels) = self.settings, self._shape
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
            gaussian=nulls.gaussian_sep(channels, settings.shares, settings.seed),
            gaussian_spectrum=nulls.gaussian_spectrum(
                tokens, channels, settings.thresholds, settings.seed
            ),
            permutation=nulls.permutation_test(
                self._sample.first(settings.permuted),
                settings.permutations,
                shares=settings.shares,
                seed=settings.seed,
            ),
            rotation=rotation(features, images, pca, settings.k or typical_rank, settings.seed)
            if len(images) > 1
            else None,
            bandwidth=nulls.bandwidth(features),
            gaussian_bandwidth=nulls.bandwidth(nulls.gaussian_tokens(channels, settings.seed)),
        )
