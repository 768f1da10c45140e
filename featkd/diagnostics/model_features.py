"""Feature maps of models applied to a folder of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from featkd.data import BadImageError, DataConfig, build_transform, read_image
from featkd.data.sampler import spread_evenly
from featkd.data.walk import find_files, warn_of_repeated_links
from featkd.data.workers import worker_options
from featkd.diagnostics.config import DiagnoseConfig
from featkd.diagnostics.source import Chunk, Layer, fingerprint
from featkd.models import FeatureModel, num_layers, resolve_layers
from featkd.models.adapters import ImageAdapter
from featkd.runtime.names import printable


@dataclass(frozen=True)
class MeasuredModel:
    """A model whose feature maps are measured.

    Attributes:
        name: prefix of its layers' names: "", "student" or "teacher".
        model: the model in evaluation mode, on its device.
        layers: layer indices, negative ones from the end; None for all.
        identity: plain values that identify its weights, for the report and for resuming.
        adapter: maps the images to the model's own statistics and size; None leaves them.
    """

    name: str
    model: FeatureModel
    layers: Sequence[int] | None
    identity: dict[str, Any]
    adapter: ImageAdapter | None = None


class ModelFeatures:
    """Feature maps of one or more models on the same images.

    Args:
        config: configuration of the run: its folder `data`, and how to read it.
        models: the models.
        images: image size, crop, interpolation, mean and std; its folders are ignored.
        device: device of the models.
        notes: facts that affect how the figures are to be read.

    Raises:
        FileNotFoundError: the folder does not exist or holds no image.
        ValueError: a layer is out of range.
    """

    repeatable = True

    def __init__(
        self,
        config: DiagnoseConfig,
        models: Sequence[MeasuredModel],
        images: DataConfig,
        device: torch.device,
        notes: Sequence[str] = (),
    ) -> None:
        self.folder = Path(config.data or "")
        self.chunk_size = config.batch_size
        paths = _find_images(self.folder, config.images)
        self._files = _Images(paths, images, self.chunk_size, config.on_bad == "skip")
        self.num_images = len(paths)
        self.notes = list(notes)
        self._images = images
        self._device = device
        self._bf16 = config.amp == "bf16"
        self._models = []
        for each in models:
            depth = num_layers(each.model)
            chosen = range(depth) if each.layers is None else each.layers
            self._models.append((each, resolve_layers(chosen, depth)))
        self.layers = tuple(Layer(each.name, i) for each, layers in self._models for i in layers)

    def model(self, name: str) -> FeatureModel:
        """Model of this name."""
        return next(each.model for each, _ in self._models if each.name == name)

    def name(self, image: int) -> str:
        return self._files.paths[image]

    def identity(self) -> dict[str, Any]:
        return {
            **{
                each.name or "model": {**each.identity, "layers": list(layers)}
                for each, layers in self._models
            },
            "data": str(self.folder.resolve()),
            "images": f"{self.num_images} ({fingerprint(self._files.paths)})",
            "preprocessing": {
                name: getattr(self._images, name)
                for name in ("img_size", "crop_pct", "interpolation", "mean", "std")
            },
            "precision": "bf16" if self._bf16 else "fp32",
            "chunk": self.chunk_size,
        }

    def chunks(self, numbers: Sequence[int]) -> Iterator[Chunk]:
        """See `Source`."""
        workers = min(self._images.workers, len(numbers))
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
            left_out = {error.path: error.cause for error in errors}
            yield Chunk(number, kept, self._maps(images) if len(kept) else {}, left_out)

    @torch.no_grad()
    def _maps(self, images: Tensor) -> dict[Layer, Tensor]:
        images = images.to(self._device, non_blocking=True)
        found: dict[Layer, Tensor] = {}
        for each, layers in self._models:
            own = images if each.adapter is None else each.adapter(images)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                maps = each.model.forward_maps(own, layers)
            found.update({Layer(each.name, i): m for i, m in zip(layers, maps, strict=True)})
        return found


class _Images(Dataset[tuple[Tensor, Tensor, list[BadImageError]]]):
    """Chunks as items: indices of the readable images, (B, 3, H, W), errors of the others."""

    def __init__(self, paths: list[str], config: DataConfig, size: int, skip: bool) -> None:
        self.paths = paths
        self.skip = skip
        self._size = size
        self._transform = build_transform(config)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[BadImageError]]:
        kept, images, bad = [], [], []
        low = number * self._size
        for image in range(low, min(low + self._size, len(self.paths))):
            try:
                pixels = read_image(self.paths[image])
            except BadImageError as error:  # returned: raised in a worker it would lose its fields
                bad.append(error)
                continue
            images.append(self._transform(pixels))
            kept.append(image)
        stacked = torch.stack(images) if images else torch.empty(0)
        return torch.tensor(kept, dtype=torch.int64), stacked, bad


def _find_images(folder: Path, limit: int | None) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder of images, got {printable(folder)}")
    found, repeated = find_files(str(folder), IMG_EXTENSIONS)
    warn_of_repeated_links(repeated)
    found.sort()
    if not found:
        raise FileNotFoundError(
            f"data: expected files ending in {', '.join(IMG_EXTENSIONS)} below "
            f"{printable(folder)}, got none"
        )
    return [found[position] for position in spread_evenly(len(found), limit)]
