"""Mismatch diagnostics of the teacher's and the students' maps, on validation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from featkd.data import Batch
from featkd.data.factory import build_evaluation_loader
from featkd.diagnostics import LayerDiagnostics, LayerResult, Settings
from featkd.models import FeatureModel
from featkd.models.lift import LiftStudent
from featkd.runtime.distributed import ProcessContext
from featkd.train.components import build
from featkd.train.precision import autocast
from featkd.train.recipe import Recipe
from featkd.train.teacher import Teacher

IMAGES = 512  # at most, so that measuring takes seconds
_SETTINGS = Settings(permuted=1, permutations=1)  # the permutation test is not used


@dataclass(frozen=True)
class MapFigures:
    """Figures of one layer's maps over the validation images; docs/diagnostics.md defines them.

    Attributes:
        channels: width of the maps.
        width: channels of the model that the maps come from; fewer than `channels` for Lift.
        rank, gaussian_rank: 99th percentile over images of the energy rank at 90 %, and the same
            of Gaussian maps.
        overlap, random_overlap: overlap of the leading subspaces of two images, and of random
            subspaces; None for a single image.
        used, gaussian_used: share of its channels that hold 90 % of a token's energy, and the same
            of Gaussian tokens.
    """

    channels: float
    width: float
    rank: float
    gaussian_rank: float
    overlap: float | None
    random_overlap: float | None
    used: float
    gaussian_used: float


@dataclass(frozen=True)
class TeacherMap:
    """The teacher's map that the students are compared with.

    Attributes:
        figures: its figures.
        reach: share of its energy that one linear projector for all images reaches from 1, 2, ...
            channels.
        images: number of validation images.
    """

    figures: MapFigures
    reach: tuple[float, ...]
    images: int

    def reach_of(self, width: float) -> float:
        """Reach of a student of so many channels."""
        return self.reach[min(round(width), len(self.reach)) - 1]


def measure_student(
    recipe: Recipe, student: FeatureModel, device: torch.device
) -> MapFigures | str:
    """Measures the student's map of the last of `loss.pairs`; a text is why that is impossible."""
    layer = recipe.loss.pairs[-1][0]
    student.eval()
    result = _measure(recipe, lambda batch: student.forward_maps(batch.images, [layer])[0], device)
    if isinstance(result, str):
        return result
    return _figures(result, student.embed_dim if isinstance(student, LiftStudent) else None)


def measure_teacher(recipe: Recipe, context: ProcessContext) -> TeacherMap | str:
    """Measures the teacher's map of the last of `loss.pairs`; a text is why that is impossible.

    Args:
        recipe: a run with the teacher and without a cache.
        context: this process.
    """
    # Compiling would take longer than the few batches.
    components = build(replace(recipe, compile=False, compile_mode="auto"), context)
    components.close()
    teacher, place = components.teacher, len(recipe.loss.pairs) - 1
    assert isinstance(teacher, Teacher)
    result = _measure(recipe, lambda batch: teacher.outputs(batch).maps[place], context.device)
    if isinstance(result, str):
        return result
    return TeacherMap(_figures(result), tuple(result.pca.spread.tolist()), result.images)


def average(maps: Sequence[MapFigures | str | None]) -> MapFigures | None:
    """Mean of the figures of several runs of one arm; None if one of them has none."""
    known = [figures for figures in maps if isinstance(figures, MapFigures)]
    if len(known) < len(maps):
        return None

    def over_runs(name: str) -> Any:
        values = [getattr(figures, name) for figures in known]
        return None if None in values else fmean(values)

    return MapFigures(**{field.name: over_runs(field.name) for field in fields(MapFigures)})


def _measure(
    recipe: Recipe, maps: Callable[[Batch], Tensor], device: torch.device
) -> LayerResult | str:
    """Measures maps (B, N, C); a text is the reason why they have no figures, as NaN."""
    loader = build_evaluation_loader(
        recipe.data, split="val", batch_size=recipe.batch_size, device=device, limit=IMAGES
    )
    stats = LayerDiagnostics(_SETTINGS)
    try:
        with closing(loader), torch.no_grad(), autocast(recipe.amp, device):
            for batch in loader:
                stats.update(maps(batch))
        return stats.result()
    except ValueError as error:  # the accuracies of a trained student count without it
        return str(error)


def _figures(result: LayerResult, width: int | None = None) -> MapFigures:
    ranks, noise = result.spectrum, result.gaussian_spectrum
    rotation = result.rotation
    return MapFigures(
        channels=result.channels,
        width=width or result.channels,
        rank=ranks.summaries[ranks.typical].percentile99,
        gaussian_rank=noise.summaries[noise.typical].percentile99,
        overlap=None if rotation is None else rotation.pair_mean,
        random_overlap=None if rotation is None else rotation.random,
        used=result.bandwidth.channels90_mean,
        gaussian_used=result.gaussian_bandwidth.channels90_mean,
    )
