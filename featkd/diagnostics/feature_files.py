"""Feature maps from files, one file an image: .npy as published, .npz or .safetensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featkd.diagnostics.source import Chunk, Layer, UnreadableError, evenly, fingerprint

_SUFFIXES = (".npy", ".npz", ".safetensors")
_MAGIC = {".npy": b"\x93NUMPY", ".npz": b"PK"}  # numpy takes what begins otherwise for a pickle
_PREFIXES = (0, 1, 2, 5)  # none; class; class and distillation; class and four registers


class FeatureFiles:
    """A folder of feature files; each is opened once, in the order of the names.

    - `.npy`: (layers, tokens, channels) as published, or (tokens, channels); Swin's published
      files are object arrays with one (tokens, channels) or (H, W, channels) array a stage.
    - `.npz`, `.safetensors`: one named array a layer, (tokens, channels), sorted by name with
      numbers by value; or one array as in .npy.

    Args:
        folder: where they are.
        layers: which layers, as in Python; None for all.
        allow_pickle: read object arrays. That runs code that the file brings along.
        prefix_tokens: class and other tokens to drop at the front of each map; "auto" drops as
            few of 0, 1, 2 or 5 as leave a square number, as published.
        limit: only so many files, spread evenly over the folder; None for all.
        chunk_size: files read at once.
        on_bad: "error" stops at an unusable file; "skip" leaves it out.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or no feature file in it.
        UnreadableError: the first file is no feature file (with "skip": none is).
        ValueError: a layer is out of range.
    """

    repeatable = False  # reading a file again costs what it cost the first time

    def __init__(
        self,
        folder: Path,
        layers: Sequence[int] | None = None,
        *,
        allow_pickle: bool = False,
        prefix_tokens: int | Literal["auto"] = "auto",
        limit: int | None = None,
        chunk_size: int = 16,
        on_bad: Literal["error", "skip"] = "error",
    ) -> None:
        if not folder.is_dir():
            kind = NotADirectoryError if folder.exists() else FileNotFoundError
            raise kind(f"features: expected a folder of feature files, got {folder}")
        kinds = {s: sorted(folder.glob(f"*{s}")) for s in _SUFFIXES}
        there = [suffix for suffix, found in kinds.items() if found]
        if len(there) != 1:
            what = f"files of {', '.join(there)}" if there else "none"
            raise FileNotFoundError(
                f"features: expected files of one of {', '.join(_SUFFIXES)} in {folder}, got {what}"
            )
        self.folder = folder
        self._paths = [kinds[there[0]][n] for n in evenly(len(kinds[there[0]]), limit)]
        self.num_images = len(self._paths)
        self.chunk_size = chunk_size
        self._allow_pickle = allow_pickle
        self._on_bad = on_bad
        self._first_image, first = self._first_readable()
        self._opened: list[Tensor] | None = first
        depth = len(first)
        chosen = range(depth) if layers is None else _resolved(layers, depth)
        self.layers = tuple(Layer("", index) for index in chosen)
        self._prefix = [
            _prefix(m.shape[0]) if prefix_tokens == "auto" else prefix_tokens for m in first
        ]
        for index in chosen:
            if not 0 <= self._prefix[index] < first[index].shape[0]:
                raise ValueError(
                    f"prefix_tokens: expected less than the {first[index].shape[0]} tokens "
                    f"of layer {index}, got {self._prefix[index]}"
                )
        self._shapes = [tuple(m.shape) for m in first]
        self.notes = self._about_prefixes() if prefix_tokens == "auto" else []

    def _about_prefixes(self) -> list[str]:
        """Which tokens were taken for class tokens, and where none could be told."""
        notes = []
        tokens = {layer.index: self._shapes[layer.index][0] for layer in self.layers}
        dropped = sorted({(tokens[n], self._prefix[n]) for n in tokens if self._prefix[n]})
        for count, prefix in dropped:
            notes.append(
                f"of {count} tokens a map the first {prefix} are taken for class or other extra "
                "tokens and dropped (prefix_tokens says otherwise)"
            )
        left = {n: tokens[n] - self._prefix[n] for n in tokens}
        odd = sorted({n for n in left.values() if math.isqrt(n) ** 2 != n})
        for count in odd:
            notes.append(
                f"{count} tokens a map form no square, so class tokens could not be told from "
                "others and none were dropped (prefix_tokens says how many to drop)"
            )
        return notes

    def _first_readable(self) -> tuple[int, list[Tensor]]:
        """The file that says how many layers there are, and its maps."""
        for image in range(self.num_images):
            try:
                return image, _read(self._paths[image], self._allow_pickle)
            except UnreadableError:
                if self._on_bad == "error" or image == self.num_images - 1:
                    raise
        raise AssertionError("a folder without files was refused before")

    def name(self, image: int) -> str:
        return str(self._paths[image])

    def identity(self) -> dict[str, Any]:
        return {
            "features": str(self.folder.resolve()),
            "files": f"{self.num_images} ({fingerprint(self._paths)})",
            "layers": [layer.index for layer in self.layers],
            "prefix tokens": [self._prefix[layer.index] for layer in self.layers],
            "chunk": self.chunk_size,
        }

    def chunks(self, numbers: Sequence[int]) -> Iterator[Chunk]:
        """See `Source`."""
        for number in numbers:
            low = number * self.chunk_size
            images = range(low, min(low + self.chunk_size, self.num_images))
            kept, rows, bad = [], [], {}
            for image in images:
                try:
                    rows.append(self._maps(image))
                    kept.append(image)
                except UnreadableError as error:
                    if self._on_bad == "error":
                        raise
                    bad[self.name(image)] = str(error)
            maps = {
                layer: torch.stack([row[position] for row in rows])
                for position, layer in enumerate(self.layers)
                if rows
            }
            yield Chunk(number, torch.tensor(kept, dtype=torch.int64), maps, bad)

    def _maps(self, image: int) -> list[Tensor]:
        """The chosen layers' patch tokens of one image."""
        if image == self._first_image and self._opened is not None:
            found, self._opened = self._opened, None
        else:
            found = _read(self._paths[image], self._allow_pickle)
        if [tuple(m.shape) for m in found] != self._shapes:
            raise UnreadableError(
                f"features: {self._paths[image]} holds maps of {_listed(found)}, but "
                f"{self._paths[self._first_image]} has {', '.join(map(str, self._shapes))}"
            )
        return [found[layer.index][self._prefix[layer.index] :] for layer in self.layers]


def _read(path: Path, allow_pickle: bool) -> list[Tensor]:
    """The maps of a file, each (tokens, channels), in the layers' order."""
    stages = False  # Swin's: (H, W, channels) is one map, not H layers
    try:
        if path.suffix == ".safetensors":
            named = safetensors.torch.load_file(path)
            arrays = [named[name] for name in sorted(named, key=_natural)]
        else:
            with path.open("rb") as file:
                _check_magic(path, file.read(6))
                file.seek(0)
                loaded = np.load(file, allow_pickle=allow_pickle)
                if path.suffix == ".npz":
                    parts = [loaded[name] for name in sorted(loaded.files, key=_natural)]
                elif loaded.dtype == object:
                    parts, stages = list(loaded), True
                else:
                    parts = [loaded]
            arrays = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
    except safetensors.SafetensorError as error:
        raise UnreadableError(
            f"features: {path} is damaged or no safetensors file: {error}"
        ) from error
    except UnreadableError:
        raise
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise UnreadableError(
                f"features: {path} holds an object array, which can't be read without running "
                "code from the file; allow_pickle allows it"
            ) from error
        raise UnreadableError(f"features: {path} is damaged or no array file: {error}") from error
    except (OSError, EOFError, TypeError) as error:
        raise UnreadableError(f"features: could not read {path}: {error}") from error
    except Exception as error:  # zipfile, pickle and zlib have errors of their own
        kind = type(error).__name__
        raise UnreadableError(f"features: {path} is damaged: {kind}: {error}") from error
    maps = _as_layers(arrays, stages)
    if not maps or any(m.dim() != 2 or not m.numel() for m in maps):
        raise UnreadableError(
            f"features: expected (layers, tokens, channels) or (tokens, channels) in {path}, got "
            f"{_listed(arrays)}"
        )
    if not all(m.is_floating_point() for m in maps):
        raise UnreadableError(
            f"features: expected floating-point numbers in {path}, got {maps[0].dtype}"
        )
    return maps


def _check_magic(path: Path, start: bytes) -> None:
    magic = _MAGIC[path.suffix]
    if not start.startswith(magic):
        raise UnreadableError(
            f"features: {path} is damaged or no {path.suffix} file: expected {magic!r} at its "
            f"beginning, got {start!r}"
        )


def _as_layers(arrays: list[Tensor], stages: bool) -> list[Tensor]:
    if len(arrays) == 1 and arrays[0].dim() == 3 and not stages:
        return list(arrays[0])
    return [a.flatten(0, 1) if a.dim() == 3 else a for a in arrays]  # Swin's (H, W, channels)


def _resolved(layers: Sequence[int], depth: int) -> list[int]:
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(
                f"layers: {layer} is out of range for files with {depth} layers "
                f"(valid: {-depth}..{depth - 1})"
            )
    return [layer % depth for layer in layers]


def _prefix(tokens: int) -> int:
    squares = (p for p in _PREFIXES if p < tokens and math.isqrt(tokens - p) ** 2 == tokens - p)
    return next(squares, 0)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts layer_2 before layer_10."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts)


def _listed(maps: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(m.shape)) for m in maps) or "nothing"
