"""Feature maps from files, one per image: .npy as published, .npz or .safetensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from featkd.data.sampler import spread_evenly
from featkd.data.walk import is_hidden
from featkd.diagnostics.config import DiagnoseConfig
from featkd.diagnostics.source import Chunk, Layer, UnreadableError, fingerprint
from featkd.models import resolve_layers
from featkd.runtime.files import open_regular

_SUFFIXES = (".npy", ".npz", ".safetensors")
_MAGIC = {".npy": b"\x93NUMPY", ".npz": b"PK"}  # numpy reads any other file as a pickle
_PREFIXES = (0, 1, 2, 5)  # none; class; class and distillation; class and four registers


class FeatureFiles:
    """Feature maps of a folder of files, each opened once, sorted by name.

    - `.npy`: (layers, tokens, channels) as published, or (tokens, channels). Swin's published
      files are object arrays with one (tokens, channels) or (H, W, channels) array per stage.
    - `.npz`, `.safetensors`: one named array (tokens, channels) per layer, sorted by name with
      numbers by value; or one array as in .npy.

    With `prefix_tokens` "auto", as few of 0, 1, 2 or 5 tokens are removed from the front of each
    map as leave a square number, as published.

    Args:
        config: configuration of the run: its folder `features`, and how to read it.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no feature files or several kinds.
        NotADirectoryError: `features` is a file.
        UnreadableError: the first file cannot be used (with on_bad "skip": no file can).
        ValueError: a layer is out of range.
    """

    repeatable = False  # no file is read twice

    def __init__(self, config: DiagnoseConfig) -> None:
        self.folder = folder = Path(config.features or "")
        if not folder.is_dir():
            kind = NotADirectoryError if folder.exists() else FileNotFoundError
            raise kind(f"features: expected a folder of feature files, got {folder}")
        names = sorted(n for n in os.listdir(folder) if not is_hidden(n))
        kinds = {s: [folder / n for n in names if n.endswith(s)] for s in _SUFFIXES}
        suffixes = [suffix for suffix, found in kinds.items() if found]
        if len(suffixes) != 1:
            raise FileNotFoundError(
                f"features: expected files of one of {', '.join(_SUFFIXES)} in {folder}, got "
                f"{', '.join(suffixes) or 'none'}"
            )
        paths = kinds[suffixes[0]]
        self._config = config
        self._paths = [paths[position] for position in spread_evenly(len(paths), config.images)]
        self.num_images = len(self._paths)
        self.chunk_size = config.batch_size
        # keeps one file's maps: the first file, which sets the shapes, is read once
        self._read = lru_cache(1)(partial(_read, allow_pickle=config.allow_pickle))
        self._first, first_maps = self._first_readable()
        self._shapes = [tuple(m.shape) for m in first_maps]
        depth = len(self._shapes)
        chosen = range(depth) if config.layers is None else config.layers
        self._chosen = resolve_layers(chosen, depth)
        self.layers = tuple(Layer("", index) for index in self._chosen)
        fixed = config.prefix_tokens
        self._prefix = {
            n: _count_prefix(self._shapes[n][0]) if fixed == "auto" else fixed for n in self._chosen
        }
        for index, prefix in self._prefix.items():
            if not 0 <= prefix < self._shapes[index][0]:
                raise ValueError(
                    f"prefix_tokens: expected fewer than the {self._shapes[index][0]} tokens "
                    f"of layer {index}, got {prefix}"
                )
        self.notes = self._prefix_notes() if fixed == "auto" else []

    def _prefix_notes(self) -> list[str]:
        """Notes on the extra tokens removed, and on token counts that form no square."""
        counts = sorted({(self._shapes[n][0], prefix) for n, prefix in self._prefix.items()})
        return [
            f"of {tokens} tokens per map the first {prefix} are removed as class or other extra "
            "tokens (prefix_tokens sets another number)"
            for tokens, prefix in counts
            if prefix
        ] + [
            f"{tokens} tokens per map form no square, so extra tokens could not be recognised "
            "and none were removed (prefix_tokens sets their number)"
            for tokens, prefix in counts
            if math.isqrt(tokens - prefix) ** 2 != tokens - prefix
        ]

    def _first_readable(self) -> tuple[Path, list[Tensor]]:
        """The first readable file, and its maps."""
        for path in self._paths:
            try:
                return path, self._read(path)
            except UnreadableError:
                if self._config.on_bad == "error" or path is self._paths[-1]:
                    raise
        raise AssertionError("the folder has files, and the last one returned or raised")

    def name(self, image: int) -> str:
        return str(self._paths[image])

    def identity(self) -> dict[str, Any]:
        return {
            "features": str(self.folder.resolve()),
            "files": f"{self.num_images} ({fingerprint(self._paths)})",
            "layers": list(self._chosen),
            "prefix tokens": list(self._prefix.values()),
            "chunk": self.chunk_size,
        }

    def chunks(self, numbers: Sequence[int]) -> Iterator[Chunk]:
        """See `Source`."""
        for number in numbers:
            low = number * self.chunk_size
            images = range(low, min(low + self.chunk_size, self.num_images))
            kept, rows, left_out = [], [], {}
            for image in images:
                try:
                    rows.append(self._maps(image))
                    kept.append(image)
                except UnreadableError as error:
                    if self._config.on_bad == "error":
                        raise
                    left_out[self.name(image)] = str(error)
            maps = {
                layer: torch.stack([row[position] for row in rows])
                for position, layer in enumerate(self.layers)
                if rows
            }
            yield Chunk(number, torch.tensor(kept, dtype=torch.int64), maps, left_out)

    def _maps(self, image: int) -> list[Tensor]:
        """Patch tokens (N, D) of one image, for each chosen layer."""
        found = self._read(self._paths[image])
        if [tuple(m.shape) for m in found] != self._shapes:
            raise UnreadableError(
                f"features: {self._paths[image]} has maps of {_format_shapes(found)}, but "
                f"{self._first} has {', '.join(map(str, self._shapes))}"
            )
        return [found[index][self._prefix[index] :] for index in self._chosen]


def _read(path: Path, allow_pickle: bool) -> list[Tensor]:
    """Maps (tokens, channels) of a file, in the order of the layers."""
    try:
        with open_regular(path) as file:
            arrays, stages = _load(path, file, allow_pickle)
    except UnreadableError:
        raise
    except OSError as error:
        raise UnreadableError(f"features: could not read {path}: {error}") from error
    except Exception as error:  # zipfile, pickle and zlib raise errors of their own
        if isinstance(error, ValueError) and "allow_pickle" in str(error):
            raise UnreadableError(
                f"features: {path} holds an object array, and reading it executes code from "
                "the file; set allow_pickle if you trust it"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableError(
            f"features: {path} is damaged or not a {path.suffix} file: {reason}"
        ) from error
    if len(arrays) == 1 and arrays[0].dim() == 3 and not stages:
        maps = list(arrays[0])
    else:
        maps = [a.flatten(0, 1) if a.dim() == 3 else a for a in arrays]  # (H, W, channels)
    if not maps or any(m.dim() != 2 or not m.numel() for m in maps):
        raise UnreadableError(
            f"features: expected (layers, tokens, channels) or (tokens, channels) in {path}, got "
            f"{_format_shapes(arrays)}"
        )
    if not all(m.is_floating_point() for m in maps):
        raise UnreadableError(
            f"features: expected floating-point values in {path}, got {maps[0].dtype}"
        )
    return maps


def _load(path: Path, file: IO[bytes], allow_pickle: bool) -> tuple[list[Tensor], bool]:
    """Arrays of a file, and True if each is a stage of Swin: (H, W, channels) is one map then."""
    if path.suffix == ".safetensors":
        named = safetensors.torch.load(file.read())
        return [named[name] for name in sorted(named, key=_natural)], False
    start = file.read(6)
    if not start.startswith(_MAGIC[path.suffix]):
        raise UnreadableError(
            f"features: {path} is damaged or not a {path.suffix} file: expected it to begin "
            f"with {_MAGIC[path.suffix]!r}, got {start!r}"
        )
    file.seek(0)
    loaded = np.load(file, allow_pickle=allow_pickle)
    stages = path.suffix == ".npy" and loaded.dtype == object
    if path.suffix == ".npz":
        loaded = [loaded[name] for name in sorted(loaded.files, key=_natural)]
    elif not stages:
        loaded = [loaded]
    return [torch.from_numpy(np.ascontiguousarray(part)) for part in loaded], stages


def _count_prefix(tokens: int) -> int:
    squares = (p for p in _PREFIXES if p < tokens and math.isqrt(tokens - p) ** 2 == tokens - p)
    return next(squares, 0)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer_2 before layer_10."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts)


def _format_shapes(maps: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(m.shape)) for m in maps) or "nothing"
