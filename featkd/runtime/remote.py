"""Places that a URL names: object stores and other file systems, by way of fsspec."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RemotePath:
    """A folder or file behind a URL, with the part of `pathlib.Path`'s surface that runs need.

    Everything a file system raises comes out as an OSError that names the URL.
    """

    url: str
    fs: Any
    """fsspec's file system (untyped)."""
    path: str
    """What the file system calls it."""

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}", self.fs, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.url.rstrip("/").rpartition("/")[2]

    def with_name(self, name: str) -> RemotePath:
        """The file of that name in the same folder."""
        folder, at = self.url.rstrip("/").rpartition("/")[0], self.path.rpartition("/")[0]
        return RemotePath(f"{folder}/{name}", self.fs, f"{at}/{name}")

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        with self._naming():
            return bool(self.fs.exists(self.path))

    def is_file(self) -> bool:
        """Whether there is a file."""
        with self._naming():
            return bool(self.fs.isfile(self.path))

    def read_bytes(self) -> bytes:
        """The whole content."""
        with self._naming():
            return bytes(self.fs.cat_file(self.path))

    def mkdir(self, *, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder where the file system has such things; object stores have none.

        Raises:
            FileExistsError: there is a file in its place.
        """
        if self.is_file():
            raise FileExistsError(f"{self} is a file")
        with self._naming():
            self.fs.makedirs(self.path, exist_ok=exist_ok)

    def replace_with(self, content: bytes, also: Iterable[RemotePath] = ()) -> None:
        """Make `content` what is here.

        It becomes what is at each of `also` first, in the same store.

        Object stores show an object when its upload is complete, other file systems while it is
        written. Written aside and then put in place, it appears whole on either: a store copies on
        its own side, where the copy appears whole too, and others rename. So after an error there
        is here what was before or, where only the answer got lost, the new content; not a part of
        it.
        """
        with self._naming():
            try:
                self.fs.pipe_file(self._aside, content)
                for other in also:
                    other._take(self._aside)
                self._take_aside()
            except BaseException:
                self._forget_aside()
                raise

    def copy_to(self, other: RemotePath) -> None:
        """A copy at `other`, made by the store, which appears whole; see `replace_with`."""
        other._take(self.path)

    def _take(self, path: str) -> None:
        """Become a copy of what the file system has at `path`."""
        with self._naming():
            try:
                self.fs.copy(path, self._aside)
                self._take_aside()
            except BaseException:
                self._forget_aside()
                raise

    def _take_aside(self) -> None:
        """Put what waits in place."""
        from fsspec.spec import AbstractFileSystem

        if type(self.fs).mv is AbstractFileSystem.mv:  # no renaming: it would copy and delete
            self.fs.copy(self._aside, self.path)
            self._forget_aside()  # it is done, even where that is refused
        else:
            self.fs.mv(self._aside, self.path)

    @property
    def _aside(self) -> str:
        """Where a new content waits; one name, so that the next one takes a killed one's place."""
        return self.with_name(f".{self.name}.tmp").path

    def _forget_aside(self) -> None:
        """Remove what waits, if the file system is there to do it and lets us."""
        try:
            if self.fs.exists(self._aside):
                self.fs.rm(self._aside)
        except Exception:  # the next write takes its place
            return

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # stores have errors of their own, of any type
            raise OSError(f"{self}: {type(error).__name__}: {error}") from error


Location = Path | RemotePath


def seekable(where: Location) -> Path | io.BytesIO:
    """What `torch.load` takes: a local path, or the content of what is elsewhere."""
    return where if isinstance(where, Path) else io.BytesIO(where.read_bytes())


def locate(where: str | PathLike[str] | RemotePath, name: str = "out") -> Location:
    """A local path, or what a URL names; "file://..." is a local path.

    Args:
        where: e.g. "runs/one", "s3://bucket/runs/one", "memory://one".
        name: the argument or field that it is of, for the error.

    Raises:
        ValueError: no such kind of URL, or its package is not installed.
    """
    if isinstance(where, RemotePath):
        return where
    text = str(where)
    if "://" not in text:
        return Path(text)
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, path = fsspec.url_to_fs(text)
    except (ImportError, ValueError) as error:
        known = ", ".join(f"{p}://" for p in ("file", "s3", "gs", "abfs", "memory"))
        raise ValueError(
            f"{name}: {text!r} can't be used: {error}; expected a path or a URL that fsspec "
            f"{fsspec.__version__} knows, such as {known}"
        ) from error
    return Path(path) if isinstance(fs, LocalFileSystem) else RemotePath(text, fs, path.rstrip("/"))
