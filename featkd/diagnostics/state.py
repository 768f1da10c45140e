"""State files of a run, written atomically and refused by a run of other arguments."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from featkd.runtime.files import atomic_write

FORMAT = 2
STATE_FILES = "process-*-of-*.pt"


class StateError(RuntimeError):
    """A state file cannot be read, or belongs to another run; names the file and the fields."""


def state_path(folder: Path, process: int, processes: int) -> Path:
    """Path of a process's state file."""
    return folder / f"process-{process}-of-{processes}.pt"


def save_state(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Saves a state of tensors and plain values.

    Raises:
        OSError: the file cannot be written; the previous state is unchanged.
    """
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, "identity": identity, "state": state}, file)
    except RuntimeError as error:  # torch.save raises it for a short write
        raise OSError(f"could not save {path}: {error}") from error


def load_state(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Loads the state of a run with this identity; None if there is none.

    Raises:
        StateError: the file cannot be read, or its identity differs; names the fields.
    """
    if not path.exists():
        _check_number_of_processes(path)
        return None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        there = {"format": loaded["format"], **loaded["identity"]}
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StateError(f"resume: {path} is no state of featkd diagnose: {reason}") from error
    here = {"format": FORMAT, **identity}
    different = [
        f"{name}: {there.get(name)} there, {here.get(name)} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if different:
        raise _other_run(path, "; ".join(different))
    state: dict[str, Any] = loaded["state"]
    return state


def _check_number_of_processes(path: Path) -> None:
    """Raises StateError if the folder holds states of another number of processes."""
    processes = path.stem.rpartition("-")[2]
    for other in sorted(path.parent.glob(STATE_FILES)):
        count = other.stem.rpartition("-")[2]
        if count != processes:
            raise _other_run(other, f"processes: {count} there, {processes} here")


def _other_run(path: Path, differences: str) -> StateError:
    return StateError(
        f"resume: {path} is the state of another run ({differences}); set another out folder, or "
        "resume never to start again"
    )
