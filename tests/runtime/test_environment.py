"""Source commit recorded with results."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import featkd
from featkd.runtime import environment


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with featkd/__init__.py, used as the source of featkd."""
    package = tmp_path / "checkout" / "featkd"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(featkd, "__file__", str(package / "__init__.py"))
    return package


def test_commit_and_changes(source: Path):
    git(source.parent, "init", "-q")
    git(source.parent, "add", ".")
    git(source.parent, "commit", "-qm", "first")
    assert environment.commit() == git(source.parent, "rev-parse", "HEAD")
    assert not environment.has_changes()
    (source.parent / "results.csv").write_text("what a run itself writes is no change")
    assert not environment.has_changes()
    (source / "__init__.py").write_text("x = 1\n")
    assert environment.has_changes()


def test_outside_a_checkout(source: Path):
    assert environment.commit() == "unknown"
    assert not environment.has_changes()
