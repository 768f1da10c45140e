"""Remote paths: files are complete or absent, and every error names the URL."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from featkd.runtime.files import atomic_link, atomic_write, remove_leftovers
from featkd.runtime.remote import Location, RemotePath, locate


class Unsteady(MemoryFileSystem):
    """Store in memory that fails on chosen calls: "rm", "info", "cp_file" to a path, "pipe_file".

    A failed upload leaves a visible part, as SFTP can.
    """

    protocol = "unsteady"
    refused: ClassVar[dict[str, str]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("unsteady://", "memory://")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if "pipe_file" in Unsteady.refused:
            super().pipe_file(path, value[:4], mode, **options)
            raise RuntimeError("the quota is used up")
        super().pipe_file(path, value, mode, **options)

    def info(self, path: str, **options: Any) -> Any:
        if "info" in Unsteady.refused:
            raise RuntimeError("the connection is lost")
        return super().info(path, **options)

    def rm(self, path: Any, **options: Any) -> None:
        if "rm" in Unsteady.refused:
            raise PermissionError("deleting is not allowed")
        super().rm(path, **options)

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        if path2.endswith(Unsteady.refused.get("cp_file", "nothing")):
            raise RuntimeError("the connection is lost")
        super().cp_file(path1, path2, **options)


class Renaming(Unsteady):
    """Implements renaming."""

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self.store[path2] = self.store.pop(path1)


fsspec.register_implementation("unsteady", Unsteady, clobber=True)


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    place = locate(tmp_path if request.param == "disk" else "memory://runs/one")
    place.mkdir(exist_ok=True)
    yield place
    if isinstance(place, RemotePath):
        place.fs.store.clear()
        place.fs.pseudo_dirs[:] = [""]


def files(folder: Location) -> set[str]:
    if isinstance(folder, Path):
        return {path.name for path in folder.iterdir()}
    return {path.rpartition("/")[2] for path in folder.fs.find(str(folder))}


def test_locate_returns_local_and_remote_paths(tmp_path: Path) -> None:
    assert locate("runs/one") == Path("runs/one")
    assert locate(tmp_path) == tmp_path
    assert locate(f"file://{tmp_path}/a") == tmp_path / "a"
    place = locate("memory://runs/one/")
    assert str(place / "last.pt") == "memory://runs/one/last.pt"
    assert (place / "last.pt").name == "last.pt"
    assert locate(place) is place


@pytest.mark.parametrize("url", ["nowhere://a/b", "s3://bucket/run"])
def test_an_unusable_url_names_the_field_and_the_cause(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # not installed
    cause = "Protocol not known" if url.startswith("nowhere") else "Install s3fs"
    with pytest.raises(ValueError, match=f"resume: '{url}' .*{cause}.*s3://, gs://"):
        locate(url, "resume")


def test_write_replaces_and_leaves_nothing_else(folder: Location) -> None:
    last, best = folder / "last.pt", folder / "best.pt"
    assert not last.exists()
    for content in (b"one", b"two"):
        with atomic_write(last) as file:
            file.write(content)
        if content == b"one":
            atomic_link(last, best)
    assert last.read_bytes() == b"two"
    assert best.read_bytes() == b"one"
    assert files(folder) == {"last.pt", "best.pt"}
    assert last.is_file()
    assert not folder.is_file()


def test_an_error_while_writing_leaves_the_old_file(folder: Location) -> None:
    """fsspec's own files upload the part written so far when the block fails."""
    last = folder / "last.pt"
    with atomic_write(last) as file:
        file.write(b"old")

    def fail_half_way() -> None:
        with atomic_write(last) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert last.read_bytes() == b"old"
    assert files(folder) == {"last.pt"}


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemotePath]:
    """A folder with last.pt, on a file system that does not fail yet."""
    monkeypatch.setattr(Unsteady, "refused", {})
    place = locate("unsteady://runs/two")
    assert isinstance(place, RemotePath)
    (place / "last.pt").replace_with(b"old")
    yield place
    place.fs.store.clear()


def test_an_incomplete_upload_leaves_the_old_file(unsteady: RemotePath) -> None:
    Unsteady.refused["pipe_file"] = ""
    last = unsteady / "last.pt"
    with pytest.raises(OSError, match=r"unsteady://runs/two/last.pt: RuntimeError: the quota is"):
        last.replace_with(b"new content")
    assert last.read_bytes() == b"old"
    assert files(unsteady) == {"last.pt"}


def test_a_refused_deletion_is_no_failure(unsteady: RemotePath) -> None:
    """The new content is in place, so no error is raised."""
    Unsteady.refused["rm"] = ""
    last = unsteady / "last.pt"
    last.replace_with(b"new")
    last.copy_to(unsteady / "best.pt")
    assert last.read_bytes() == (unsteady / "best.pt").read_bytes() == b"new"
    Unsteady.refused.clear()
    for path in (last, unsteady / "best.pt"):
        path.replace_with(b"newer")  # replaces and removes the temporary file
    assert files(unsteady) == {"last.pt", "best.pt"}


@pytest.mark.parametrize("step", [".best.pt.tmp", "/best.pt"])
def test_a_failed_copy_leaves_no_temporary_file(unsteady: RemotePath, step: str) -> None:
    last, best = unsteady / "last.pt", unsteady / "best.pt"
    best.replace_with(b"before")
    Unsteady.refused["cp_file"] = step
    with pytest.raises(OSError, match=r"best.pt: RuntimeError: the connection is lost"):
        last.copy_to(best)
    assert best.read_bytes() == b"before"
    assert files(unsteady) == {"last.pt", "best.pt"}


def test_renaming_is_used_if_implemented(unsteady: RemotePath) -> None:
    last = RemotePath(f"{unsteady}/last.pt", Renaming(), "/runs/two/last.pt")
    Unsteady.refused["cp_file"] = "/last.pt"
    last.replace_with(b"new")
    assert last.read_bytes() == b"new"
    assert files(unsteady) == {"last.pt"}


def test_the_next_upload_replaces_a_killed_one(unsteady: RemotePath) -> None:
    unsteady.fs.pipe_file("/runs/two/.last.pt.tmp", b"half of wh")
    remove_leftovers(unsteady)
    (unsteady / "last.pt").replace_with(b"whole")
    assert files(unsteady) == {"last.pt"}


def test_errors_name_the_url(unsteady: RemotePath) -> None:
    with pytest.raises(OSError, match=f"{unsteady}/none: FileNotFoundError"):
        (unsteady / "none").read_bytes()
    with pytest.raises(FileExistsError, match=r"last.pt is a file, expected a folder"):
        (unsteady / "last.pt").mkdir()


def test_a_lost_connection_is_not_an_absent_file(unsteady: RemotePath) -> None:
    """Otherwise a run would start anew and replace its checkpoint."""
    last = unsteady / "last.pt"
    Unsteady.refused["info"] = ""
    for check in (last.exists, last.is_file):
        with pytest.raises(OSError, match=r"last.pt: RuntimeError: the connection is lost"):
            check()
    Unsteady.refused.clear()
    assert last.exists()
    assert not (unsteady / "none").exists()
    assert not (unsteady / "none").is_file()
