"""What the command lines have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace


class Parser(ArgumentParser):
    """Raises what is wrong for the caller to report, in place of printing a usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(f"{message}\nsee {self.prog} --help")


def several(
    parser: ArgumentParser, name: str, allowed: Sequence[str], default: Sequence[str]
) -> None:
    """Add an option that takes some words among `allowed`."""
    text = f"among {', '.join(allowed)} (default: {' '.join(default)})"
    parser.add_argument(f"--{name}", nargs="+", type=str, default=list(default), help=text)


def add_json(parser: ArgumentParser) -> None:
    """Add the option of every command that has figures to write; see `check_folders`."""
    parser.add_argument("--json", type=str, default=None, metavar="FILE", help="figures as JSON")


def check_known(words: Sequence[str], known: Sequence[str], free: Sequence[str] = ()) -> None:
    """Refuse an unknown option and name the nearest; a parser would only refuse it.

    Args:
        words: a command line.
        known: the options, without their dashes.
        free: beginnings of names that may go on in any way.
    """
    from featkd.runtime.checks import (
        suggestion,  # brings torch along, which OpenMP's settings go before
    )

    for word in words:
        name = word[2:].split("=")[0]
        if word.startswith("--") and name not in known and not name.startswith(tuple(free)):
            raise ValueError(f"no option --{name}{suggestion(name, known)}")


def check_folders(options: Namespace, names: Sequence[str]) -> None:
    """Raise FileNotFoundError, before the work, where a result could not be written after it."""
    for name in names:
        value = options.get(name)
        if value is not None and not Path(value).absolute().parent.is_dir():
            raise FileNotFoundError(f"--{name}: no folder {Path(value).parent} to write {value} in")
