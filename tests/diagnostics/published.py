"""The published definitions in float64 numpy, image by image, without code of featkd."""

from __future__ import annotations

import numpy as np


def reaching(curve, threshold):
    """First 1-based index at which a curve reaches a threshold."""
    return int(np.nonzero(curve >= threshold)[0][0]) + 1


def spectrum(features, thresholds):
    """Energy ranks (M, T) and curves (M, n) of the singular values of each image."""
    curves = []
    for x in features:
        energy = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
        curves.append(np.cumsum(energy) / energy.sum())
    ranks = [[reaching(curve, t) for t in thresholds] for curve in curves]
    return np.array(ranks), np.array(curves)


def dataset_pca(features, centred=False):
    """Eigenvalues and axes of the second moment of all tokens, largest first."""
    tokens = features.reshape(-1, features.shape[-1]).astype(np.float64)
    if centred:
        tokens = tokens - tokens.mean(0)
    values, vectors = np.linalg.eigh(tokens.T @ tokens / len(tokens))
    return values[::-1], vectors[:, ::-1]


def captured(features, vectors, thresholds, mean=0.0):
    """Dimensions (M, T) and curves (M, D) of each image's energy in the leading axes."""
    curves = []
    for x in features:
        energy = (((x.astype(np.float64) - mean) @ vectors) ** 2).sum(0)
        curves.append(np.cumsum(energy) / energy.sum())
    return np.array([[reaching(c, t) for t in thresholds] for c in curves]), np.array(curves)


def sep(features):
    """Mean and standard deviation (D,) of the tokens' cumulative spectra."""
    curves = []
    for x in features:
        power = np.abs(np.fft.fft(x.astype(np.float64), axis=-1)) ** 2
        curves.append(np.cumsum(power, -1) / power.sum(-1, keepdims=True))
    curves = np.concatenate(curves)
    return curves.mean(0), curves.std(0)


def overlap(x, y, k):
    """Mean cos^2 of the k principal angles between the leading right singular subspaces."""
    v = [np.linalg.svd(a.astype(np.float64))[2][:k] for a in (x, y)]
    cosines = np.linalg.svd(v[0] @ v[1].T, compute_uv=False)
    return float((cosines**2).sum() / k)
