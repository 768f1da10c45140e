"""Writes a cache: locks the folder, keeps intact shards and writes the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from featkd.cache import manifest as manifests
from featkd.cache.manifest import CacheError, Manifest, read_manifest
from featkd.cache.rows import Row
from featkd.cache.shard import find_damage, write_shard
from featkd.runtime.files import remove_leftovers
from featkd.runtime.lock import output_folder
from featkd.runtime.names import listed


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process, and creates it if missing; see `featkd.runtime.lock`.

    Raises:
        CacheError: another process has locked it, it holds something other than a cache, or the
            path is a file. Nothing is changed then.
    """
    if folder.is_dir() and not (folder / manifests.NAME).exists():
        others = sorted(p.name for p in folder.iterdir() if p.name[0] != ".")
        if others:
            raise CacheError(
                f"out: {folder} holds {listed(others, 5)}; expected a cache or an empty folder"
            )
    with output_folder(folder, CacheError):
        yield


def prepare_folder(folder: Path, manifest: Manifest) -> Manifest:
    """Starts a cache in the locked `folder`, or continues the one there.

    Returns:
        The manifest in the folder.

    Raises:
        CacheError: the folder holds another cache, or the same one with more views.
    """
    held = read_manifest(folder) if (folder / manifests.NAME).exists() else None
    if held is not None:
        if different := held.differences(manifest):
            raise CacheError(f"out: {folder} holds another cache: {'; '.join(different)}")
        if manifest.views < held.views:
            raise CacheError(
                f"views: expected at least {held.views}, which {folder} is made for, got "
                f"{manifest.views}"
            )
    for place in (folder, *folder.glob("view-*")):
        remove_leftovers(place)
    if held is None or manifest.views > held.views:
        manifest.write(folder)
        return manifest
    return held


class CacheWriter:
    """Finds missing shards of a cache and writes them.

    Args:
        folder: folder of the cache, after `prepare_folder`.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._identity = manifest.identity
        self.damaged: list[str] = []
        """Error messages, one per damaged shard."""

    def intact(self, view: int, shards: Sequence[int]) -> Iterator[bool]:
        """Checks some shards of a view; yields True for each that exists without damage."""
        for shard, keys in zip(shards, self.manifest.keys(view, shards), strict=True):
            most = self.manifest.most_shard_bytes(shard)
            path = self._path(view, shard)
            exists = path.exists()
            found = find_damage(path, self._identity, keys, most) if exists else []
            if found:
                self.damaged.append("\n".join(found))
            yield exists and not found

    def write(
        self, view: int, shard: int, keys: Tensor, source_index: Tensor, rows: Sequence[Row]
    ) -> None:
        """Writes a shard atomically; see `write_shard` for the arguments.

        Raises:
            CacheError: the disk is full or the folder not writable.
        """
        assert len(rows) == len(keys) == len(self.manifest.positions(shard))
        path = self._path(view, shard)
        try:
            path.parent.mkdir(exist_ok=True)
            write_shard(
                path, self._identity, keys, source_index, rows, self.manifest.layout.varying
            )
        except OSError as error:
            raise CacheError(
                f"could not write {path}: {error}; the shards written before are intact"
            ) from error

    def _path(self, view: int, shard: int) -> Path:
        return self.folder / self.manifest.shard_name(view, shard)
