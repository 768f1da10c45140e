"""Feature maps kept on disk for the second pass, so that none is computed or read twice."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from featkd.diagnostics.source import Layer

KEPT_FILES = "kept-*"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class KeptFeatures:
    """Feature maps of chunks, in one file per chunk.

    Args:
        folder: folder of the files.
        dtype: "fp32" or "bf16".
    """

    def __init__(self, folder: Path, dtype: Literal["fp32", "bf16"]) -> None:
        self._folder = folder
        self._dtype = _DTYPES[dtype]
        self._unsynced: list[Path] = []

    def write(self, number: int, images: Tensor, maps: dict[Layer, Tensor]) -> None:
        """Writes the usable images of a chunk and their maps; both may be empty.

        Raises:
            OSError: the file cannot be written; the message names it.
        """
        path = self._path(number)
        values = {str(la): m.detach().to("cpu", self._dtype).contiguous() for la, m in maps.items()}
        try:
            path.write_bytes(save({"images": images.contiguous(), **values}))
        except OSError as error:
            raise OSError(f"could not write {path}: {error}") from error
        self._unsynced.append(path)

    def read(self, number: int, layers: Iterable[Layer]) -> tuple[Tensor, dict[Layer, Tensor]]:
        """Images and maps of a chunk.

        Raises:
            ValueError: the file is missing or damaged.
        """
        path = self._path(number)
        try:
            with path.open("rb") as file:  # safetensors opens no path that is not UTF-8
                found = load_file(f"/proc/self/fd/{file.fileno()}")  # maps it, without a copy
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"resume: {path} is missing or damaged ({error}); start again with resume never"
            ) from error
        return found["images"], {la: found[str(la)] for la in layers if str(la) in found}

    def sync(self) -> None:
        """Flushes the files to disk."""
        for path in self._unsynced:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()

    def _path(self, number: int) -> Path:
        return self._folder / f"kept-{number}.safetensors"
