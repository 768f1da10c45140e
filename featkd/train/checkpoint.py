"""Checkpoints of a run: saving, keeping, loading and comparing with a recipe."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from featkd.data.workers import is_worker_error
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.files import atomic_write, remove_leftovers
from featkd.runtime.lock import FolderInUse, locked
from featkd.runtime.remote import AnyPath, Location, locate, seekable
from featkd.runtime.scores import rank
from featkd.train.checkpoint_layout import find_fault

FORMAT = 2
# Entries of a checkpoint that `best.pt` does not need, without their content.
_EMPTY: Mapping[str, Any] = {"optimizer": {"state": {}, "param_groups": []}, "scaler": {}}


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, read, or used with this recipe; names file and cause."""


class CheckpointStore:
    """Stores the checkpoints of a run in a folder: `last.pt`, `best.pt`, `epoch-<n>.pt`.

    Every file appears whole or not at all. An `epoch-<n>.pt` equal to the last checkpoint is a hard
    link to the same file, without a second write. `best.pt` holds no state of the optimizer, which
    is half of a checkpoint: it is for evaluation and for use as a teacher, not for resuming.

    Args:
        folder: folder on disk or behind a URL; created if missing.
        keep_every: keep the checkpoint of every k-th epoch; None for none.
    """

    def __init__(self, folder: Location, keep_every: int | None = None) -> None:
        self.folder = folder
        self.keep_every = keep_every
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"

    @contextmanager
    def opened(self, context: ProcessContext) -> Iterator[None]:
        """Creates and locks the folder, removes temporary files; all processes must call it.

        Raises:
            CheckpointError: the path is a file, or another run writes to the folder; raised on all
                processes.
        """
        with ExitStack() as lock:

            def open_folder() -> None:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    lock.enter_context(locked(self.folder))
                except (FileExistsError, NotADirectoryError) as error:
                    message = f"out: {self.folder} is a file, expected a folder"
                    raise CheckpointError(message) from error
                except FolderInUse as error:
                    raise CheckpointError(f"out: {error}") from error
                remove_leftovers(self.folder)

            context.on_main(open_folder)
            yield

    def save(
        self, state: dict[str, Any], *, is_best: bool = False, ended_epoch: int | None = None
    ) -> None:
        """Saves `state` as the last checkpoint.

        `best.pt` and `epoch-<n>.pt` are written before `last.pt`. After a kill at any moment, the
        ones that belong to `last.pt` therefore exist.

        Args:
            state: tensors and plain values only, so that it loads with weights_only.
            is_best: also save as `best.pt`.
            ended_epoch: number of epochs done if an epoch has just ended, else None.

        Raises:
            CheckpointError: the disk is full or the folder not writable; `last.pt` is unchanged.
        """
        names = []
        if ended_epoch is not None and self.keep_every and ended_epoch % self.keep_every == 0:
            names.append(self.folder / f"epoch-{ended_epoch:04d}.pt")
        try:
            if is_best:
                self._save_best(state)
            with atomic_write(self.last, names) as file:
                torch.save({"format": FORMAT, **state}, file)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise CheckpointError(f"could not save {self.last}: {error}; {self._kept()}") from error

    def _save_best(self, state: Mapping[str, Any]) -> None:
        light = {name: _EMPTY.get(name, value) for name, value in state.items()}
        with atomic_write(self.best) as file:
            torch.save({"format": FORMAT, **light}, file)

    def _kept(self) -> str:
        """Describes the state of `last.pt` after a failed save."""
        try:
            found = self.last.is_file()
        except OSError:  # a lost connection
            return "an earlier checkpoint is unchanged"
        return "the earlier checkpoint is unchanged" if found else "there is no earlier checkpoint"

    def restore_best(self, path: Location, state: dict[str, Any]) -> dict[str, Any]:
        """Restores `best.pt` when a run resumes in another folder, or if the file was lost.

        Every checkpoint holds the best score, but only one holds the state that reached it. That
        one is copied from `path`, or from the `best.pt` in the same folder as `path`. A better
        `best.pt` in this folder is kept.

        Args:
            path: the checkpoint that the run resumes from, in this folder or another.
            state: its content.

        Returns:
            The score of `best.pt`, which later scores have to exceed; empty if there is no
            `best.pt`.

        Raises:
            CheckpointError: `best.pt` can't be read or written.
        """
        score: dict[str, Any] = state["best"]
        kept: dict[str, Any] = load(self.best)["best"] if self.best.is_file() else {}
        if not score or (kept and rank(kept) >= rank(score)):
            return kept
        if score["update"] != state["update"]:
            source: Location = path.with_name("best.pt")
            state = load(source) if source.is_file() else {"best": {}}
            if state["best"] != score:
                return kept
        try:
            self._save_best(state)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            if isinstance(error, RuntimeError) and is_worker_error(error):
                raise
            raise CheckpointError(f"could not save {self.best}: {error}") from error
        return score


def load(path: AnyPath) -> dict[str, Any]:
    """Reads a featkd checkpoint onto the CPU, without unpickling any code.

    Raises:
        CheckpointError: it is missing, damaged, not a featkd checkpoint or of another format; names
            the entry that is missing or of a wrong type.
    """
    location = locate(path, "checkpoint")
    if location.exists() and not location.is_file():  # a pipe would be waited for
        raise CheckpointError(f"could not read the checkpoint {path}: not a regular file")
    try:
        state = torch.load(seekable(location), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text advises to run code from the file
        raise CheckpointError(
            f"could not read the checkpoint {path}: not a file of torch.save, damaged, or with "
            "objects that can't be read without running code from it"
        ) from error
    except Exception as error:  # a damaged file can raise any
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"could not read the checkpoint {path}: {text}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of a featkd run")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {state['format']}, this featkd reads {FORMAT}"
        )
    # Missing in earlier versions, or under another name.
    state.setdefault("evaluation_pending", state.pop("due", False))
    fault = find_fault(state)
    if fault is not None:
        raise CheckpointError(f"{path}: damaged: {fault}")
    return state
