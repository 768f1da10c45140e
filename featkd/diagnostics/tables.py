"""Machine-readable findings: summary.json, CSV tables, per_image.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from featkd.diagnostics.findings import Findings, format_share
from featkd.diagnostics.layer_diagnostics import LayerResult
from featkd.diagnostics.per_image import Summary
from featkd.diagnostics.source import Layer
from featkd.ops import reference
from featkd.runtime.files import atomic_write, write_csv

SCHEMA = 1
_SUMMARY = ("percentile99", "mean", "std", "median", "smallest", "largest")


def write_tables(out: Path, findings: Findings) -> None:
    """Writes summary.json, five CSV tables and per_image.safetensors into a folder."""
    summary = {
        "schema": SCHEMA,
        "about": findings.about,
        "images": findings.images,
        "images_per_s": findings.images_per_s,
        "left_out": findings.left_out,
        "notes": findings.notes,
        "layers": [_layer_summary(layer, r) for layer, r in findings.layers.items()],
        "reach": [{**asdict(r), "teacher": str(r.teacher)} for r in findings.reach],
    }
    with atomic_write(out / "summary.json") as file:
        file.write(json.dumps(summary, indent=1, allow_nan=False).encode())
    layers = findings.layers.items()
    write = partial(write_csv, digits=9)
    names = ("model", "layer")
    write(out / "ranks.csv", (*names, "measure", "threshold", *_SUMMARY), _rank_rows(layers))
    columns = (*names, "share", "d", "d_over_D", "folded_d", "folded_d_over_D")
    nulls = ("gaussian_d_over_D", "sample_d_over_D", "sample_low", "sample_high")
    permuted = ("permuted_mean", "permuted_low", "permuted_high", "p_value")
    write(out / "sep.csv", (*columns, *nulls, *permuted), _sep_rows(layers))
    rotation = ("k", "pair_mean", "pair_std", "dataset_mean", "dataset_std", "random")
    write(out / "rotation.csv", (*names, *rotation), _rotation_rows(layers, rotation))
    write(out / "curves.csv", (*names, "curve", "index", "mean", "std"), _curve_rows(layers))
    write(out / "images.csv", ("index", "name"), enumerate(findings.names))
    tensors = {}
    for layer, result in layers:
        name = f"{layer.model or 'model'}.{layer.index}"
        tensors[f"{name}.images"] = result.spectrum.images
        tensors[f"{name}.ranks"] = result.spectrum.ranks
        if result.captured is not None:
            tensors[f"{name}.dims"] = result.captured.dims
        if result.rotation is not None:
            for kind in ("images", "overlap", "overlap_dataset"):
                tensors[f"{name}.rotation_{kind}"] = getattr(result.rotation, kind)
    with atomic_write(out / "per_image.safetensors") as file:
        file.write(safetensors.torch.save(tensors))


def _layer_summary(layer: Layer, r: LayerResult) -> dict[str, Any]:
    levels = [format_share(t) for t in r.spectrum.thresholds]
    thresholds = torch.tensor(r.spectrum.thresholds, dtype=torch.float64)
    dims = reference.first_reaching(r.pca.spread, thresholds)
    rotation = None
    if r.rotation is not None:
        rotation = asdict(r.rotation)
        for name in ("images", "overlap", "overlap_dataset"):  # in per_image.safetensors
            del rotation[name]
        for name in ("angles_deg", "random_angles_deg"):
            rotation[name] = rotation[name].tolist()
    permutation = asdict(r.permutation)
    del permutation["permuted_curve"]
    return {
        "model": layer.model,
        "layer": layer.index,
        "tokens": r.tokens,
        "channels": r.channels,
        "images": r.images,
        "svd": _summaries(levels, r.spectrum.summaries),
        "svd_gaussian": _summaries(levels, r.gaussian_spectrum.summaries),
        "zero_images": r.spectrum.zero_images,
        "pca": None if r.captured is None else _summaries(levels, r.captured.summaries),
        "pca_centred": r.pca.centred,
        "pca_of_all_tokens": dict(zip(levels, dims.tolist(), strict=True)),
        "unsolved": r.spectrum.unsolved,
        "sep": {
            "shares": list(r.sep.shares),
            "d_over_D": list(r.sep.relative()),
            "folded_d_over_D": list(r.sep.folded_relative()),
            "gaussian_d_over_D": list(r.gaussian.relative()),
            "gaussian_folded_d_over_D": list(r.gaussian.folded_relative()),
            "zero_tokens": r.sep.zero_tokens,
            "permutation": permutation,
        },
        "bandwidth": asdict(r.bandwidth),
        "gaussian_bandwidth": asdict(r.gaussian_bandwidth),
        "rotation": rotation,
    }


def _summaries(levels: Sequence[str], summaries: Sequence[Summary]) -> dict[str, Any]:
    return {level: asdict(s) for level, s in zip(levels, summaries, strict=True)}


_Layers = Iterable[tuple[Layer, LayerResult]]


def _rank_rows(layers: _Layers) -> Iterable[Sequence[Any]]:
    for layer, r in layers:
        for kind, found in (("svd", r.spectrum), ("pca", r.captured)):
            if found is None:
                continue
            for threshold, s in zip(found.thresholds, found.summaries, strict=True):
                numbers = [getattr(s, n) for n in _SUMMARY]
                yield layer.model, layer.index, kind, format_share(threshold), *numbers


def _sep_rows(layers: _Layers) -> Iterable[Sequence[Any]]:
    for layer, r in layers:
        p = r.permutation
        for share, *numbers in zip(
            r.sep.shares,
            r.sep.bandwidth,
            r.sep.relative(),
            r.sep.folded_bandwidth,
            r.sep.folded_relative(),
            r.gaussian.relative(),
            *(p.observed, p.low, p.high, p.permuted_mean, p.permuted_low, p.permuted_high),
            p.p_value,
            strict=True,
        ):
            yield layer.model, layer.index, format_share(share), *numbers


def _rotation_rows(layers: _Layers, columns: Sequence[str]) -> Iterable[Sequence[Any]]:
    for layer, r in layers:
        if r.rotation is not None:
            yield layer.model, layer.index, *(getattr(r.rotation, name) for name in columns)


def _curve_rows(layers: _Layers) -> Iterable[Sequence[Any]]:
    for layer, r in layers:
        curves = {
            "svd": (r.spectrum.curve_mean, r.spectrum.curve_std),
            "svd_gaussian": (r.gaussian_spectrum.curve_mean, r.gaussian_spectrum.curve_std),
            "pca_of_all_tokens": (r.pca.spread, None),
            **({"pca": (r.captured.curve_mean, r.captured.curve_std)} if r.captured else {}),
            "sep": (r.sep.mean, r.sep.std),
            "sep_folded": (r.sep.folded_mean, r.sep.folded_std),
            "sep_gaussian": (r.gaussian.mean, r.gaussian.std),
            "sep_permuted": (r.permutation.permuted_curve, None),
        }
        for name, (mean, std) in curves.items():
            deviations = [""] * len(mean) if std is None else std.tolist()
            for index, (m, s) in enumerate(zip(mean.tolist(), deviations, strict=True), 1):
                yield layer.model, layer.index, name, index, m, s
