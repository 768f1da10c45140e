"""`manifest.json` of a cache: what the rows depend on, and how they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from featkd.cache.rows import LayerShape, Layout
from featkd.data import EpochSampler, SampleKey
from featkd.runtime.files import atomic_write, read_regular

SCHEMA = 2
NAME = "manifest.json"

_MOST_BYTES = 1 << 24
_MOST_ROWS = 2**31  # of a view; their order is held in memory
_MOST_SHARDS = 10**7  # of all views
_MOST_ROW_BYTES = 1 << 32
MOST_HEADER_BYTES = 1 << 20  # of a shard
_INDEX_BYTES = 256  # per row; more than its keys, source index, checksum and ends


# errors of reading damaged JSON or safetensors
_DAMAGE = (AttributeError, LookupError, RecursionError, TypeError, ValueError, SafetensorError)


class CacheError(RuntimeError):
    """A cache can't be written, read or used; names the file or field, and the cause."""


@contextmanager
def as_cache_error(path: Path) -> Iterator[None]:
    """Turns errors of reading a damaged or missing file into CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{path}: can't be read: {error}") from error
    except _DAMAGE as error:
        raise CacheError(f"{path}: damaged: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`.

    Args:
        subject: everything that the rows depend on, as field -> plain value. It includes
            "data.images" (their number), "seed" and "data.augment.repeats"; view v is epoch v of
            the `EpochSampler` with these three.
        weights: SHA-256 of the teacher's weights, in their dtypes.
        depth: number of layers of the teacher.
        layout: columns of a row.
        rows: rows per view.
        shard_rows: rows per shard; the last shard of a view can have fewer.
        batch_size: images per forward pass of the teacher.
        views: views in the cache; more can be added.
        checkpoint: file name of the teacher's checkpoint, compared if the file is missing; no row
            depends on it.
    """

    subject: Mapping[str, Any]
    weights: str
    depth: int
    layout: Layout
    rows: int
    shard_rows: int
    batch_size: int
    views: int
    checkpoint: str | None = None

    @property
    def identity(self) -> str:
        """SHA-256 of everything that determines a shard's bytes; stored in every shard."""
        return hashlib.sha256(_dump(self._content(whole=False))).hexdigest()

    @property
    def images(self) -> int:
        """Images in the split."""
        return int(self.subject["data.images"])

    @property
    def repeats(self) -> int:
        """Copies per image in a view."""
        return int(self.subject["data.augment.repeats"])

    def sampler(self) -> EpochSampler:
        """Sampler whose epoch v yields the keys of view v, in the order of the rows."""
        seed, repeats = self.subject["seed"], self.repeats
        return EpochSampler(self.images, training=True, repeats=repeats, seed=int(seed))

    @property
    def shards(self) -> int:
        """Shards per view."""
        return -(-self.rows // self.shard_rows)

    def positions(self, shard: int) -> range:
        """Positions of a shard's rows within the view."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.rows))

    def keys(self, view: int, shards: Sequence[int]) -> Iterator[list[SampleKey]]:
        """Yields the keys of the rows of some shards of a view, shard by shard."""
        ranges = [self.positions(shard) for shard in shards]
        sampler = self.sampler()
        sampler.set_epoch(view)
        keys = sampler.keys(chain.from_iterable(ranges))  # shuffles the view once for all shards
        return (list(islice(keys, len(positions))) for positions in ranges)

    def most_shard_bytes(self, shard: int) -> int:
        """Upper bound of the size of a shard's file."""
        columns = len(self.layout.varying) * 8 + _INDEX_BYTES + self.layout.most_row_bytes
        return MOST_HEADER_BYTES + len(self.positions(shard)) * columns

    def shard_name(self, view: int, shard: int) -> str:
        """Path of a shard below the cache's folder."""
        return f"view-{view:05d}/shard-{shard:05d}.safetensors"

    def write(self, folder: Path) -> None:
        """Writes the manifest atomically, with a checksum."""
        content = self._content(whole=True)
        with atomic_write(folder / NAME) as file:
            file.write(_dump({**content, "checksum": _checksum(content)}))

    def differences(self, other: Manifest) -> list[str]:
        """Fields that differ in another manifest, as "field: this value, not the other"."""
        own, its = self._content(whole=False), other._content(whole=False)
        return differing(_flat(own), _flat(its))

    def _content(self, *, whole: bool) -> dict[str, Any]:
        """All fields as plain values; without `whole`, only those that rows depend on."""
        content = {"schema": SCHEMA, **asdict(self), "subject": dict(self.subject)}
        if not whole:
            del content["views"], content["checkpoint"]
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain


_EXPLAINED = {
    "augmentation_version": " (this version of featkd draws other crops, flips, operations and "
    "erased boxes; expected a cache that it has made)"
}


def differing(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Fields in which two mappings of plain values differ, as "field: held, not asked"."""
    names = [*held, *(name for name in asked if name not in held)]
    return [
        f"{name}: {held.get(name)!r}, not {asked.get(name)!r}"
        f"{_EXPLAINED.get(name.rpartition('.')[2], '')}"
        for name in names
        if held.get(name) != asked.get(name)
    ]


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of the cache in `folder`.

    Raises:
        CacheError: it is missing, damaged, or of another version of the format.
    """
    path = folder / NAME
    if not folder.exists():
        raise CacheError(f"{folder}: no such folder; expected one that featkd cache has written")
    try:
        written = read_regular(path, _MOST_BYTES)
    except OSError as error:
        raise CacheError(
            f"{folder}: not a featkd cache: {NAME}: {error.strerror or error}"
        ) from error
    with as_cache_error(path):
        content = json.loads(written)
        checksum, schema = content.pop("checksum"), content.pop("schema")
    # Compares bytes as well: changed white space leaves the content unchanged.
    whole = {"schema": schema, **content}
    if checksum != _checksum(whole) or written != _dump({**whole, "checksum": checksum}):
        raise CacheError(f"{path}: damaged: the content does not match its checksum")
    if schema != SCHEMA:
        raise CacheError(f"{path}: format {schema}, this featkd reads {SCHEMA}")
    # A checksum shows accidents; a manifest that was made up can have the right one.
    with as_cache_error(path):
        layout = content.pop("layout")
        layers = tuple(LayerShape(**layer) for layer in layout.pop("layers"))
        manifest = Manifest(layout=Layout(layers=layers, **layout), **content)
        _check_bounds(manifest, path)
    return manifest


def _check_bounds(manifest: Manifest, path: Path) -> None:
    """Raises CacheError if a number of a manifest is out of bounds."""
    subject, layout = manifest.subject, manifest.layout
    bounds = [
        ("seed", subject["seed"], 0, 2**63 - 1),
        ("depth", manifest.depth, 1, _MOST_ROWS),
        ("rows", manifest.rows, 1, _MOST_ROWS),
        ("shard_rows", manifest.shard_rows, 1, _MOST_ROWS),
        ("batch_size", manifest.batch_size, 1, _MOST_ROWS),
        ("views", manifest.views, 1, _MOST_SHARDS),
        ("layout.classes", layout.classes, 1, _MOST_ROW_BYTES),
    ]
    bounds += [(x, subject[x], 1, _MOST_ROWS) for x in ("data.images", "data.augment.repeats")]
    if layout.logits_top is not None:
        bounds.append(("layout.logits_top", layout.logits_top, 1, layout.classes))
    for shape in layout.layers:
        name = f"layer {shape.layer!r}"
        if not shape.is_pooled:
            bounds.append((name, shape.layer, 0, manifest.depth - 1))
        bounds.append((f"{name}: tokens", shape.tokens, 1, _MOST_ROW_BYTES))
        bounds.append((f"{name}: channels", shape.channels, 1, _MOST_ROW_BYTES))
    for name, value, least, most in bounds:
        if type(value) is not int or not least <= value <= most:
            raise CacheError(
                f"{path}: damaged: {name}: expected a whole number from {least} to {most}, got "
                f"{value!r}"
            )
    images, shards = manifest.images * manifest.repeats, manifest.views * manifest.shards
    for name, value, most, unit in (
        ("views, rows, shard_rows", shards, _MOST_SHARDS, " shards"),
        ("layout", layout.most_row_bytes, _MOST_ROW_BYTES, " bytes per row"),
        ("rows", manifest.rows, images, ", the images and their copies"),
    ):
        if value > most:
            raise CacheError(f"{path}: damaged: {name}: expected at most {most}{unit}, got {value}")


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the fields of subject and layout with the other fields."""
    others = {k: v for k, v in content.items() if k not in ("subject", "layout")}
    return {**content["subject"], **content["layout"], **others}


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()
