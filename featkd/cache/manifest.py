"""What a cache's rows depend on and how they are stored: `manifest.json`, written first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from featkd.cache.rows import LayerShape, Layout
from featkd.data import EpochSampler, Key
from featkd.data.sampler import StretchSampler
from featkd.runtime.files import atomic_write

SCHEMA = 2
NAME = "manifest.json"


class CacheError(RuntimeError):
    """A cache that can't be written, read or used; names the file or field, and the cause."""


@dataclass(frozen=True)
class Manifest:
    """The head of a cache.

    Args:
        subject: what the rows depend on: field -> plain value, "data.images" (how many), "seed"
            and "data.augment.repeats" among them. Where one differs it is another cache. View v is
            epoch v of the `EpochSampler` that these three make.
        weights: SHA-256 of the teacher's, as it held them.
        depth: its layers.
        layout: what a row holds.
        rows: in a view.
        shard_rows: in each of its shards but the last.
        batch_size: images that the teacher saw at once.
        views: in the cache; more can be added.
        checkpoint: name of the teacher's file, which tells it from others where it is not at hand;
            no row depends on it.
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
        """SHA-256 of all that a shard's bytes follow from; every shard carries it."""
        return hashlib.sha256(_dump(self._content(whole=False))).hexdigest()

    @property
    def images(self) -> int:
        """In the split."""
        return int(self.subject["data.images"])

    @property
    def repeats(self) -> int:
        """Copies of an image in a view."""
        return int(self.subject["data.augment.repeats"])

    def sampler(self) -> EpochSampler:
        """That gives the keys of the views, as its epochs, in the order of their rows."""
        seed = int(self.subject["seed"])
        return EpochSampler(self.images, training=True, repeats=self.repeats, seed=seed)

    @property
    def shards(self) -> int:
        """Of a view."""
        return -(-self.rows // self.shard_rows)

    def positions(self, shard: int) -> range:
        """Where in its view a shard's rows are."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.rows))

    def keys(self, view: int, shards: Sequence[int]) -> Iterator[list[Key]]:
        """Those of the rows of some shards of a view, shard by shard."""
        seed = int(self.subject["seed"])
        sampler = StretchSampler(self.images, repeats=self.repeats, seed=seed)
        stretches = [self.positions(shard) for shard in shards]
        sampler.choose(view, stretches)
        keys = iter(sampler)  # the view is shuffled once for all of them
        return (list(islice(keys, len(stretch))) for stretch in stretches)

    def shard_name(self, view: int, shard: int) -> str:
        """Below the cache's folder."""
        return f"view-{view:05d}/shard-{shard:05d}.safetensors"

    def write(self, folder: Path) -> None:
        """Write it whole, with a checksum."""
        content = self._content(whole=True)
        with atomic_write(folder / NAME) as file:
            file.write(_dump({**content, "checksum": _checksum(content)}))

    def differences(self, other: Manifest) -> list[str]:
        """What another one says otherwise, as "field: this one's, not the other's"."""
        own, its = self._content(whole=False), other._content(whole=False)
        return differing(_flat(own), _flat(its))

    def _content(self, *, whole: bool) -> dict[str, Any]:
        content = {"schema": SCHEMA, **asdict(self), "subject": dict(self.subject)}
        if not whole:  # but for what the rows don't depend on
            del content["views"], content["checkpoint"]
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain


def differing(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Fields in which two mappings of plain values differ, as "field: held, not asked"."""
    names = [*held, *(name for name in asked if name not in held)]
    return [
        f"{name}: {held.get(name)!r}, not {asked.get(name)!r}"
        for name in names
        if held.get(name) != asked.get(name)
    ]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the cache in `folder`.

    Raises:
        CacheError: there is none, it is damaged, or of another version of the format.
    """
    path = folder / NAME
    try:
        written = path.read_bytes()
    except OSError as error:
        raise CacheError(f"{folder}: not a cache of featkd: {error}") from error
    try:
        content = json.loads(written)
        checksum = content.pop("checksum")
        schema = content.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CacheError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    # Byte by byte: a changed blank would leave the content as it is.
    whole = {"schema": schema, **content}
    if checksum != _checksum(whole) or written != _dump({**whole, "checksum": checksum}):
        raise CacheError(f"{path}: damaged: its content does not have the checksum it names")
    if schema != SCHEMA:
        raise CacheError(f"{path}: format {schema}, this featkd reads {SCHEMA}")
    layout = content.pop("layout")
    layers = tuple(LayerShape(**layer) for layer in layout.pop("layers"))
    return Manifest(layout=Layout(layers=layers, **layout), **content)


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """The subject's and the layout's fields beside the others."""
    others = {k: v for k, v in content.items() if k not in ("subject", "layout")}
    return {**content["subject"], **content["layout"], **others}


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()
