"""A short run, for the commands that read checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from featkd.cli.main import main
from featkd.train.recipe import Recipe
from tests.train.runs import run


@pytest.fixture
def checkpoint(alone: Recipe) -> Path:
    run(replace(alone, optim=replace(alone.optim, epochs=1, warmup_epochs=0)))
    return Path(alone.out) / "last.pt"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Checks that a command line ends with a code and a line that begins with a message."""

    def check(words: tuple[object, ...], code: int, message: str) -> None:
        assert main([*map(str, words)]) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("featkd: ")
        assert message in said.err
        assert said.err.count("\n") == 1, said.err

    return check
