"""Writing a cache: one writer a folder, whole shards kept, the others computed."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from featkd.cache import manifest as manifests
from featkd.cache.manifest import CacheError, Manifest, read_manifest
from featkd.cache.rows import Row
from featkd.cache.shard import damages_of, write_shard
from featkd.data import Key
from featkd.runtime.files import remove_leftovers

_LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if missing, for this process alone; a killed one's hold is gone.

    Raises:
        CacheError: another process holds it, it holds something else than a cache, or there is a
            file in its place. Nothing is changed then.
    """
    _refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CacheError(f"out: {folder} is a file, expected a folder") from error
    with (folder / _LOCK).open("wb") as file:
        try:
            # A record lock, unlike flock's, is not inherited by the loader's forked workers,
            # which outlive a killed process for a moment.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CacheError(f"out: another process is writing the cache in {folder}") from error
        yield


def prepare(folder: Path, manifest: Manifest) -> Manifest:
    """Begin the cache in `folder`, or go on with the one there; call it in `locked`.

    Returns:
        The manifest as it is in the folder.

    Raises:
        CacheError: there is another cache, or something else.
    """
    held = read_manifest(folder) if (folder / manifests.NAME).exists() else None
    if held is not None:
        different = held.differences(manifest)
        if different:
            raise CacheError(f"out: {folder} holds another cache: {'; '.join(different)}")
        if manifest.views < held.views:
            raise CacheError(
                f"views: {folder} holds or is to hold {held.views}, asked for {manifest.views}; "
                "expected at least as many"
            )
    for place in (folder, *folder.glob("view-*")):
        remove_leftovers(place)
    if held is None or manifest.views > held.views:
        manifest.write(folder)
        return manifest
    return held


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and not (folder / manifests.NAME).exists():
        others = sorted(p.name for p in folder.iterdir() if p.name[0] != ".")
        if others:
            raise CacheError(f"out: {folder} holds no cache, but {', '.join(others[:5])}")


class CacheWriter:
    """Finds what is missing of a cache, and writes shards of it.

    Args:
        folder: prepared.
        manifest: of the cache there.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._identity = manifest.identity
        self.damaged: list[str] = []
        """Why shards that were there are written anew."""

    def whole(self, view: int, shards: Sequence[int]) -> Iterator[bool]:
        """Whether each of some shards of a view is there and whole, of which every row is read."""
        for shard, keys in zip(shards, self.manifest.keys(view, shards), strict=True):
            yield self._is_whole(view, shard, keys)

    def write(
        self, view: int, shard: int, keys: Tensor, shown: Tensor, rows: Sequence[Row]
    ) -> None:
        """Write a shard whole, rows in the order of their positions; arguments as `write_shard`.

        Raises:
            CacheError: the disk is full or the folder not writable.
        """
        assert len(rows) == len(keys) == len(self.manifest.positions(shard))
        path = self._path(view, shard)
        try:
            path.parent.mkdir(exist_ok=True)
            write_shard(path, self._identity, keys, shown, rows, self.manifest.layout.varying)
        except OSError as error:
            raise CacheError(
                f"could not write {path}: {error}; what was written before is whole"
            ) from error

    def _path(self, view: int, shard: int) -> Path:
        return self.folder / self.manifest.shard_name(view, shard)

    def _is_whole(self, view: int, shard: int, keys: Sequence[Key]) -> bool:
        path = self._path(view, shard)
        if not path.exists():
            return False
        found = damages_of(path, self._identity, keys)
        if found:
            self.damaged.append("\n".join(found))
        return not found
