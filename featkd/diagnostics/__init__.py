"""Mismatch diagnostics: spectra, dataset PCA, subspace rotation and SEP, beside null models.

`diagnose` runs everything on a data set and writes the report; the accumulators below measure
feature maps that your own code computes.

>>> import torch
>>> from featkd.diagnostics import LayerDiagnostics
>>> stats = LayerDiagnostics()
>>> stats.update(torch.randn(8, 49, 32))  # the patch tokens of 8 images
>>> result = stats.result()
"""

from __future__ import annotations

from featkd.diagnostics.config import DiagnoseConfig, Settings
from featkd.diagnostics.findings import Findings
from featkd.diagnostics.layer_diagnostics import LayerDiagnostics, LayerResult
from featkd.diagnostics.pca import CapturedEnergy, DatasetPCA
from featkd.diagnostics.run import diagnose
from featkd.diagnostics.singular_spectrum import SpectrumStats
from featkd.diagnostics.spectral_energy_pattern import SEP

__all__ = [
    "SEP",
    "CapturedEnergy",
    "DatasetPCA",
    "DiagnoseConfig",
    "Findings",
    "LayerDiagnostics",
    "LayerResult",
    "Settings",
    "SpectrumStats",
    "diagnose",
]
