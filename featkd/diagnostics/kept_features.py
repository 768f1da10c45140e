"""Feature maps kept on disk for the second pass, so that none is computed or read twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from featkd.diagnostics.source import Layer

KEPT_FILES = "kept-*-of-process-*.bin"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class KeptFeatures:
    """Feature maps of one process: one flat file per layer, in the order they were appended.

    Args:
        folder: folder of the files.
        process: rank of this process, part of the file names.
        dtype: "fp32" or "bf16".
    """

    def __init__(self, folder: Path, process: int, dtype: Literal["fp32", "bf16"]) -> None:
        self._folder = folder
        self._process = process
        self._dtype = _DTYPES[dtype]
        self._layers: list[Layer] = []
        self._shapes: list[tuple[int, ...]] = []
        self._images: list[Tensor] = []

    def append(self, maps: dict[Layer, Tensor], images: Tensor) -> None:
        """Writes the maps of some images.

        Raises:
            OSError: a file cannot be written; the message names it. The features of the last
                `state_dict` are still readable.
        """
        if not self._layers:
            self._layers = list(maps)
            self._shapes = [tuple(m.shape[1:]) for m in maps.values()]
        mode = "ab" if self._images else "wb"  # of a run that ended before its first state
        for position, m in enumerate(maps.values()):
            values = m.detach().to("cpu", self._dtype).contiguous()
            path = self._path(position)
            try:
                with path.open(mode) as file:
                    file.write(values.view(torch.uint8).numpy().data)
            except OSError as error:  # a short write does not name the file
                raise OSError(error.errno, error.strerror, str(path)) from error
        self._images.append(images)

    def read(self, start: int = 0) -> Iterator[tuple[dict[Layer, Tensor], Tensor]]:
        """Yields memory-mapped maps and their images, from the `start`-th `append` on."""
        total = sum(len(images) for images in self._images)
        if not total:
            return
        kind = {torch.float32: np.float32, torch.bfloat16: np.int16}[self._dtype]
        arrays = [
            np.memmap(self._path(position), kind, "c", shape=(total, *shape))
            for position, shape in enumerate(self._shapes)
        ]
        high = sum(len(images) for images in self._images[:start])
        for images in self._images[start:]:
            part = slice(high, high := high + len(images))
            maps = {
                layer: torch.from_numpy(array[part]).view(self._dtype)
                for layer, array in zip(self._layers, arrays, strict=True)
            }
            yield maps, images

    def sync(self) -> None:
        """Flushes the files to disk."""
        for position in range(len(self._layers)):
            with self._path(position).open("rb") as file:
                os.fsync(file.fileno())

    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": [(layer.model, layer.index) for layer in self._layers],
            "shapes": self._shapes,
            "images": torch.cat([torch.empty(0, dtype=torch.int64), *self._images]),
            "lengths": [len(images) for images in self._images],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state and truncates the files to it.

        Raises:
            ValueError: a file is shorter than the state.
        """
        self._layers = [Layer(*layer) for layer in state["layers"]]
        self._shapes = [tuple(shape) for shape in state["shapes"]]
        self._images = list(torch.split(state["images"], state["lengths"]))
        for position, shape in enumerate(self._shapes):
            path = self._path(position)
            size = len(state["images"]) * int(np.prod(shape)) * self._dtype.itemsize
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(
                    f"resume: {path} is missing or shorter than its state; start again with "
                    "resume never"
                )
            os.truncate(path, size)

    def _path(self, position: int) -> Path:
        return self._folder / f"kept-{position}-of-process-{self._process}.bin"
