"""Mismatch diagnostics: spectra, dataset PCA, subspace rotation and SEP, beside null models.

>>> import torch
>>> from featkd.diagnostics import LayerDiagnostics
>>> stats = LayerDiagnostics()
>>> stats.update(torch.randn(8, 49, 32))  # the patch tokens of 8 images
>>> found = stats.result()
"""

from featkd.diagnostics.pca import CapturedEnergy, DatasetPCA
from featkd.diagnostics.sep import SEP
from featkd.diagnostics.spectrum import SpectrumStats
from featkd.diagnostics.stream import LayerDiagnostics, LayerResult, Settings

__all__ = [
    "SEP",
    "CapturedEnergy",
    "DatasetPCA",
    "LayerDiagnostics",
    "LayerResult",
    "Settings",
    "SpectrumStats",
]
