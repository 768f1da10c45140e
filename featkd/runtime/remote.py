"""Paths behind URLs: object stores and other file systems, accessed through fsspec."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL, with the methods of `pathlib.Path` that runs need.

    Every error of a file system is raised as an OSError that names the URL.
    """

    url: str
    fs: Any
    """The fsspec file system (untyped)."""
    path: str
    """Path within the file system."""

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}", self.fs, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.url.rstrip("/").rpartition("/")[2]

    def with_name(self, name: str) -> RemotePath:
        """Returns the file with that name in the same folder."""
        url, path = self.url.rstrip("/").rpartition("/")[0], self.path.rpartition("/")[0]
        return RemotePath(f"{url}/{name}", self.fs, f"{path}/{name}")

    def exists(self) -> bool:
        """Checks whether the file or folder exists."""
        return self._type() is not None

    def is_file(self) -> bool:
        """Checks whether the file exists and is not a folder."""
        return self._type() == "file"

    def _type(self) -> str | None:
        # Not fs.exists or fs.isfile, which return False on a lost connection.
        with self._translated_errors():
            try:
                return str(self.fs.info(self.path)["type"])
            except FileNotFoundError:
                return None

    def read_bytes(self) -> bytes:
        """Reads the whole content."""
        with self._translated_errors():
            return bytes(self.fs.cat_file(self.path))

    def mkdir(self, *, parents: bool = True, exist_ok: bool = True) -> None:
        """Creates the folder; a no-op on object stores, which have none.

        Raises:
            FileExistsError: the path is a file.
        """
        if self.is_file():
            raise FileExistsError(f"{self} is a file, expected a folder")
        with self._translated_errors():
            self.fs.makedirs(self.path, exist_ok=exist_ok)

    def replace_with(self, content: bytes, also: Iterable[RemotePath] = ()) -> None:
        """Replaces the content atomically; first that of each of `also`, in the same store.

        The content is uploaded under a temporary name, because some file systems show a file while
        it is written. An object store then copies it on its side, which is atomic; other file
        systems rename it. After an error the path has its old content or, if only the reply was
        lost, the new content, and never a part of it.
        """
        with self._replaced():
            self.fs.pipe_file(self._temporary, content)
            for other in also:
                other._copy_from(self._temporary)

    def copy_to(self, other: RemotePath) -> None:
        """Lets the store copy the file to `other`, atomically as in `replace_with`."""
        other._copy_from(self.path)

    def _copy_from(self, path: str) -> None:
        """Replaces the content with that of `path` in the same file system."""
        with self._replaced():
            self.fs.copy(path, self._temporary)

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Moves the temporary file, which the block writes, to the path; removes it on an error."""
        from fsspec.spec import AbstractFileSystem

        with self._translated_errors():
            try:
                yield
                if type(self.fs).mv is AbstractFileSystem.mv:  # cannot rename, only copy and delete
                    self.fs.copy(self._temporary, self.path)
                    self._remove_temporary()  # the replacement is complete even if this fails
                else:
                    self.fs.mv(self._temporary, self.path)
            except BaseException:
                self._remove_temporary()
                raise

    @property
    def _temporary(self) -> str:
        """Name of the temporary file; always the same, so a write replaces an interrupted one's."""
        return self.with_name(f".{self.name}.tmp").path

    def _remove_temporary(self) -> None:
        """Removes the temporary file, if the file system allows it."""
        with suppress(Exception):  # the next write replaces it
            if self.fs.exists(self._temporary):
                self.fs.rm(self._temporary)

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # stores raise errors of any type
            raise OSError(f"{self}: {type(error).__name__}: {error}") from error


Location = Path | RemotePath
AnyPath = str | PathLike[str] | RemotePath
"""A path or a URL as users and callers name it."""


class DownloadedFile(RemotePath):
    """Remote file whose content is downloaded on the first read and kept."""

    def read_bytes(self) -> bytes:
        return self._content

    @cached_property
    def _content(self) -> bytes:
        return super().read_bytes()


def seekable(where: Location) -> Path | io.BytesIO:
    """Returns a file for `torch.load`: a local path, or the content of a remote file."""
    return where if isinstance(where, Path) else io.BytesIO(where.read_bytes())


def locate(where: AnyPath, name: str = "out") -> Location:
    """Converts a path or URL to a Location; "file://..." gives a local path.

    Args:
        where: e.g. "runs/one", "s3://bucket/runs/one" or "memory://one".
        name: the argument or field that holds it, for the error.

    Raises:
        ValueError: fsspec does not know the protocol, or its package is not installed.
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
        raise ValueError(
            f"{name}: {text!r} can't be used: {error}; expected a path or a URL that fsspec "
            f"{fsspec.__version__} supports, such as file://, s3://, gs://, abfs://, memory://"
        ) from error
    return Path(path) if isinstance(fs, LocalFileSystem) else RemotePath(text, fs, path.rstrip("/"))


def locate_once(where: AnyPath, name: str) -> Location:
    """Converts a path or URL to a Location that downloads a remote file at most once."""
    found = locate(where, name)
    if isinstance(found, RemotePath):
        return DownloadedFile(found.url, found.fs, found.path)
    return found
