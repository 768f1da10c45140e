"""Checkpoints: what is saved, when it is kept, and how a run finds its way back."""

from __future__ import annotations

import pickle
from os import PathLike
from typing import Any

import torch

from featkd.data.workers import is_of_worker
from featkd.runtime.files import atomic_link, atomic_write, remove_leftovers
from featkd.runtime.remote import Location, RemotePath, locate, seekable

FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written, read, or used with this recipe; names file and cause."""


class CheckpointStore:
    """The checkpoints of one run in one folder: `last.pt`, `best.pt`, `epoch-<n>.pt`.

    Every file appears whole or not at all. `best.pt` and `epoch-<n>.pt` are further names of the
    same file where they are equal to the last, so that keeping them costs no second write.

    Args:
        folder: where they lie, on disk or behind a URL; made if missing.
        keep_every: keep every k-th epoch's state for good, or None.
    """

    def __init__(self, folder: Location, keep_every: int | None = None) -> None:
        self.folder = folder
        self.keep_every = keep_every
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"

    def prepare(self) -> None:
        """Make the folder and clear what a killed run left half-written.

        Raises:
            CheckpointError: there is a file in its place.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise CheckpointError(f"out: {self.folder} is a file, expected a folder") from error
        remove_leftovers(self.folder)

    def save(
        self, state: dict[str, Any], *, is_best: bool = False, ended_epoch: int | None = None
    ) -> None:
        """Save `state` as the last checkpoint.

        Args:
            state: tensors and plain values only, so that it loads with weights_only.
            is_best: whether it is the best so far.
            ended_epoch: number of epochs done, where one has just ended.

        A kill at any moment leaves a `last.pt` of which all further names are there as well: they
        come first, so that at worst a run that goes on from the state before makes them again.

        Raises:
            CheckpointError: the disk is full or the folder not writable; `last.pt` is untouched.
        """
        names = []
        if ended_epoch is not None and self.keep_every and ended_epoch % self.keep_every == 0:
            names.append(self.folder / f"epoch-{ended_epoch:04d}.pt")
        if is_best:
            names.append(self.best)
        try:
            with atomic_write(self.last, names) as file:
                torch.save({"format": FORMAT, **state}, file)
        except (OSError, RuntimeError) as error:  # torch.save turns a short write into the latter
            if isinstance(error, RuntimeError) and is_of_worker(error):
                raise
            raise CheckpointError(
                f"could not save {self.last}: {error}; what was there before is untouched"
            ) from error

    def bring_best(self, path: Location, state: dict[str, Any]) -> dict[str, Any]:
        """Have the state of the best score in `best.pt` when a run goes on from a checkpoint.

        The score comes with every checkpoint, the state only with one: where the run goes on in
        another folder, and where a `best.pt` was lost, `best.pt` is brought from `path` or from
        beside it.

        Args:
            path: the checkpoint that the run goes on from, of this folder or another.
            state: its content.

        Returns:
            The score that `best.pt` has now, and that is to be beaten: a better one of its own
            than `state` knows of stays; nothing where there is no such state any more.

        Raises:
            CheckpointError: `best.pt` can't be read or written.
        """
        score: dict[str, Any] = state["best"]
        kept: dict[str, Any] = load(self.best)["best"] if self.best.is_file() else {}
        if not score or (kept and kept["top1"] >= score["top1"]):
            return kept
        source: Location = path if score["update"] == state["update"] else path.with_name("best.pt")
        try:
            if source != path and (not source.is_file() or load(source)["best"] != score):
                return kept
            atomic_link(source, self.best)
        except OSError as error:
            raise CheckpointError(f"could not save {self.best}: {error}") from error
        return score


def load(path: str | PathLike[str] | RemotePath) -> dict[str, Any]:
    """Read a checkpoint of featkd onto the CPU, without unpickling any code.

    Raises:
        CheckpointError: it is missing, damaged, of another kind or of another format.
    """
    where = locate(path, "checkpoint")
    try:
        state = torch.load(seekable(where), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"could not read the checkpoint {path}: {error}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of a featkd run")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {state['format']}, this featkd reads {FORMAT}"
        )
    return state


def check_same_model(path: Location, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Compare the recipe in a checkpoint with the one that is to go on from it.

    Args:
        path: the checkpoint, for the message.
        saved, current: the recipes as plain dicts.

    Returns:
        The fields that differ, as "field: saved -> current" (not those that only say where and
        how often something is written).

    Raises:
        CheckpointError: the students differ.
    """
    harmless = ("out", "log_every", "checkpoint", "device", "data.workers", "data.path")
    changed = {
        name: f"{name}: {old!r} -> {new!r}"
        for name, old, new in _differences(saved, current)
        if not any(name == h or name.startswith(f"{h}.") for h in harmless)
    }
    student = [text for name, text in changed.items() if name.startswith("student")]
    if student:
        raise CheckpointError(
            f"{path}: holds another student than the recipe asks for ({'; '.join(student)})"
        )
    return list(changed.values())


def named(classes: list[str]) -> str:
    """The first few of some class names, and how many there are."""
    few = ", ".join(classes[:5])
    return few if len(classes) <= 5 else f"{few}, ... {len(classes)} in all"


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            found += _differences(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [(name, old, new)]
