"""Feature maps from models that look at a folder of images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from featkd.data import BadImageError, DataConfig, build_transform, read_image
from featkd.data.workers import worker_options
from featkd.diagnostics.source import Chunk, Layer, evenly, fingerprint
from featkd.models import FeatureModel, num_layers, resolve_layers


@dataclass(frozen=True)
class Subject:
    """A model to look at.

    Attributes:
        name: what its layers are called by: "", or "student" and "teacher".
        model: in evaluation mode, on its device.
        layers: which, as in Python; None for all.
        about: what identifies its weights, for the report and for resuming; plain values.
    """

    name: str
    model: FeatureModel
    layers: tuple[int, ...] | None
    about: dict[str, Any]


class ModelFeatures:
    """The maps of one or more models on the same images.

    Args:
        subjects: the models.
        folder: images anywhere below it, taken in the order of their paths.
        config: image size, crop, filter, mean and std; its folders are ignored.
        device: where the models are.
        bf16: whether to run them in bfloat16 by autocast.
        limit: only so many images, spread evenly over the folder; None for all.
        chunk_size: images in a batch.
        on_bad: "error" stops at an unreadable image; "skip" leaves it out.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: a layer is out of range.
    """

    repeatable = True

    def __init__(
        self,
        subjects: Sequence[Subject],
        folder: Path,
        config: DataConfig,
        *,
        device: torch.device,
        bf16: bool = False,
        limit: int | None = None,
        chunk_size: int = 16,
        on_bad: Literal["error", "skip"] = "error",
    ) -> None:
        self.folder = folder
        self._files = _Images(_find_images(folder, limit), config, chunk_size, on_bad == "skip")
        self.num_images = len(self._files.paths)
        self.chunk_size = chunk_size
        self.notes: list[str] = []
        self._config = config
        self._device = device
        self._bf16 = bf16
        self._models = [
            (
                subject,
                tuple(range(num_layers(subject.model)))
                if subject.layers is None
                else resolve_layers(subject.layers, num_layers(subject.model)),
            )
            for subject in subjects
        ]
        self.layers = tuple(
            Layer(subject.name, index) for subject, layers in self._models for index in layers
        )

    def model(self, name: str) -> FeatureModel:
        """The model of a subject's name."""
        return next(subject.model for subject, _ in self._models if subject.name == name)

    def name(self, image: int) -> str:
        return self._files.paths[image]

    def identity(self) -> dict[str, Any]:
        config = self._config
        return {
            **{
                subject.name or "model": {**subject.about, "layers": list(layers)}
                for subject, layers in self._models
            },
            "data": str(self.folder.resolve()),
            "images": f"{self.num_images} ({fingerprint(self._files.paths)})",
            "preprocessing": {
                "img_size": config.img_size,
                "crop_pct": config.crop_pct,
                "interpolation": config.interpolation,
                "mean": list(config.mean),
                "std": list(config.std),
            },
            "precision": "bf16" if self._bf16 else "fp32",
            "chunk": self.chunk_size,
        }

    def chunks(self, numbers: Sequence[int]) -> Iterator[Chunk]:
        """See `Source`."""
        workers = min(self._config.workers, len(numbers))
        loader = DataLoader(
            self._files,
            batch_size=None,
            sampler=list(numbers),
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),
            **worker_options(workers),
        )
        for number, (kept, images, errors) in zip(numbers, loader, strict=True):
            if errors and not self._files.skip:
                raise errors[0]
            bad = {error.path: error.cause for error in errors}
            yield Chunk(number, kept, self._maps(images) if len(kept) else {}, bad)

    @torch.no_grad()
    def _maps(self, images: Tensor) -> dict[Layer, Tensor]:
        images = images.to(self._device, non_blocking=True)
        found: dict[Layer, Tensor] = {}
        for subject, layers in self._models:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                maps = subject.model.forward_maps(images, layers)
            found.update(zip([Layer(subject.name, index) for index in layers], maps, strict=True))
        return found


class _Images(Dataset[tuple[Tensor, Tensor, list[BadImageError]]]):
    """Item c is chunk c: indices of the readable images, (B, 3, H, W), and the other images."""

    def __init__(self, paths: list[str], config: DataConfig, size: int, skip: bool) -> None:
        self.paths = paths
        self.skip = skip
        self._size = size
        self._transform = build_transform(config, training=False)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[BadImageError]]:
        kept, images, bad = [], [], []
        low = number * self._size
        for image in range(low, min(low + self._size, len(self.paths))):
            try:
                pixels = read_image(self.paths[image])
            except BadImageError as error:  # as data: a worker would hand on its text alone
                bad.append(error)
                continue
            images.append(self._transform(pixels))
            kept.append(image)
        stacked = torch.stack(images) if images else torch.empty(0)
        return torch.tensor(kept, dtype=torch.int64), stacked, bad


def _find_images(folder: Path, limit: int | None) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder of images, got {folder}")
    found = sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
    )
    if not found:
        raise FileNotFoundError(
            f"data: no image below {folder}; expected files ending in {', '.join(IMG_EXTENSIONS)}"
        )
    return [found[position] for position in evenly(len(found), limit)]
