"""State files of a run: written whole, and refused where they are another run's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from featkd.runtime.files import atomic_write

FORMAT = 1
STATE_FILES = "process-*-of-*.pt"


class StateError(RuntimeError):
    """A state file can't be read, or is another run's; names file and fields."""


def state_path(folder: Path, process: int, processes: int) -> Path:
    """Where a process's state lies."""
    return folder / f"process-{process}-of-{processes}.pt"


def save_state(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a state of tensors and plain values.

    Raises:
        OSError: the disk is full; what was there before is untouched.
    """
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, "identity": identity, "state": state}, file)
    except RuntimeError as error:  # torch.save's word for a short write
        raise OSError(f"could not save {path}: {error}") from error


def load_state(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state that a run of this identity left, or None.

    Raises:
        StateError: it can't be read, or its identity differs; says which fields.
    """
    if not path.exists():
        _check_others(path)
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        there = {"format": found["format"], **found["identity"]}
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StateError(f"resume: {path} is no state of featkd diagnose: {why}") from error
    here = {"format": FORMAT, **identity}
    different = [
        f"{name}: {_plain(there.get(name))} there, {_plain(here.get(name))} here"
        for name in sorted({*there, *here})
        if _plain(there.get(name)) != _plain(here.get(name))
    ]
    if different:
        raise _another(path, "; ".join(different))
    state: dict[str, Any] = found["state"]
    return state


def _check_others(path: Path) -> None:
    """A state of another number of processes must not lie there unseen."""
    processes = path.stem.rpartition("-")[2]
    for other in sorted(path.parent.glob(STATE_FILES)):
        count = other.stem.rpartition("-")[2]
        if count != processes:
            raise _another(other, f"processes: {count} there, {processes} here")


def _another(path: Path, what: str) -> StateError:
    return StateError(
        f"resume: {path} is the state of another run ({what}); give another folder, or start "
        "afresh with resume never"
    )


def _plain(value: Any) -> Any:
    """Tuples as lists: the command line gives the one where the defaults are the other."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
