"""One process's part of a run: two passes over its images, and states to resume from."""

from __future__ import annotations

import contextlib
import json
import time
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import featkd
from featkd.diagnostics.accumulator import Accumulator
from featkd.diagnostics.config import DiagnoseConfig
from featkd.diagnostics.findings import Findings
from featkd.diagnostics.kept_features import KEPT_FILES, KeptFeatures
from featkd.diagnostics.layer_diagnostics import LayerDiagnostics
from featkd.diagnostics.pca import CapturedEnergy, mean_token
from featkd.diagnostics.source import Chunk, Layer, Source, UnreadableError, num_chunks
from featkd.diagnostics.state import STATE_FILES, load_state, save_state, state_path
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.files import remove_leftovers
from featkd.runtime.interrupt import Interrupt

_Part = TypeVar("_Part", bound=Accumulator)

_GIB = 2**30
_LARGEST = 1e17  # squares of larger values approach the maximum of float32


class Interrupted(KeyboardInterrupt):
    """The run was stopped by SIGINT or SIGTERM, after saving its state.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class ProcessRun:
    """One process's part of a run.

    Process r of P computes the chunks r, r + P, r + 2 P and so on. All sums are exact, so the
    figures depend neither on the number of processes nor on kills and resumes.

    Args:
        source: feature maps of the images.
        config: configuration of the run; its source, device and folders are not read here.
        folder: folder for states and kept features, created if missing and emptied at the end.
        context: this process.
        quiet: show no progress bars.
    """

    def __init__(
        self,
        source: Source,
        config: DiagnoseConfig,
        folder: Path,
        context: ProcessContext,
        quiet: bool = True,
    ) -> None:
        self.source = source
        self.config = config
        self.context = context
        self.quiet = quiet
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if context.is_main:
            remove_leftovers(folder)
        self._state_path = state_path(folder, context.rank, context.world_size)
        self._chunk_numbers = range(context.rank, num_chunks(source), context.world_size)
        self._stats = {layer: LayerDiagnostics(config.settings) for layer in source.layers}
        self._kept = None if config.keep == "never" else KeptFeatures(folder, config.keep)
        self._captured: dict[Layer, CapturedEnergy] = {}
        self._captured_states: list[Any] = []  # resumed, until the axes are known
        self._left_out: dict[str, str] = {}
        # pilot means of the first usable chunk, and values per image of all layers
        self._calibration: tuple[list[Tensor], int] | None = None
        self._read_ahead: dict[int, Chunk] = {}  # read for the calibration, not yet counted
        self._pass = 1
        self._chunks_done = 0  # of this pass
        self._next_save = time.monotonic() + config.save_seconds
        self._notes: list[str] = []

    def run(self) -> Findings | None:
        """Runs both passes, or the rest of them after a resume.

        Returns:
            The findings on process 0, without `reach` and `about`; None on the others.

        Raises:
            Interrupted: a signal stopped the run.
            UnreadableError: features cannot be used, with on_bad "error".
            StateError: the folder holds the state of another run.
            OSError: a file cannot be written; the last saved state is intact.
        """
        if self.config.resume == "auto":
            self._resume()
        else:
            self._remove_files()
        with Interrupt() as interrupt:
            self._calibrate()
            started, before = time.monotonic(), self._images_counted()
            if self._pass == 1:
                self._first_pass(interrupt)
            seconds, counted = time.monotonic() - started, self._images_counted() - before
            if not self.context.any_true(self._images_counted() > 0):
                raise UnreadableError("none of the images could be used")
            merged = {layer: self._merged(stats) for layer, stats in self._stats.items()}
            for layer, stats in merged.items():
                pca = self.context.broadcast(None if stats is None else stats.pca())
                self._captured[layer] = CapturedEnergy(pca, self.config.settings.thresholds)
            self._second_pass(interrupt)
        return self._findings(merged, counted / seconds if counted else None)

    def clear(self) -> None:
        """Removes all states and kept features; call it once the results are saved."""
        self._remove_files()
        with contextlib.suppress(OSError):  # the folder may hold files of others
            if self.context.is_main:
                self._folder.rmdir()

    def _remove_files(self) -> None:
        """Removes the files of runs with any number of processes."""
        self.context.barrier()
        if self.context.is_main:
            # states first: a state without its features cannot be resumed
            for pattern in (STATE_FILES, KEPT_FILES):
                for path in self._folder.glob(pattern):
                    path.unlink(missing_ok=True)
        self.context.barrier()

    # First pass.

    def _first_pass(self, interrupt: Interrupt) -> None:
        numbers = self._chunk_numbers[self._chunks_done :]
        ahead = [n for n in numbers if n in self._read_ahead]
        known = map(self._read_ahead.pop, ahead)  # one by one: each is freed after its turn
        with self._progress_bar() as bar:
            for chunk in chain(known, self.source.chunks(numbers[len(ahead) :])):
                self._left_out.update(chunk.left_out)
                images, maps = self._usable(chunk)
                for layer, m in maps.items():
                    self._stats[layer].update(m, images)
                if self._kept is not None:
                    self._kept.write(chunk.number, images, maps)
                self._chunk_done(bar, interrupt)
        self._pass, self._chunks_done = 2, 0
        self._save()

    def _calibrate(self) -> None:
        """Gives all processes the pilot means of the first usable chunk, which process 0 reads."""
        was_calibrated = self._calibration is not None
        if self.context.is_main and not was_calibrated:
            self._calibration = self._first_usable()
        calibration = self.context.broadcast(self._calibration)
        if calibration is None or was_calibrated:
            return
        self._calibration = pilots, values_per_image = calibration
        for stats, pilot in zip(self._stats.values(), pilots, strict=True):
            stats.calibrate(pilot)
        itemsize = {"fp32": 4, "bf16": 2, "never": 0}[self.config.keep]
        needed = self.source.num_images * itemsize * values_per_image / _GIB
        if needed > self.config.budget_gib:
            self._kept = None
            self._note(
                f"features are not kept: they take {needed:.3g} GiB, budget_gib is "
                f"{self.config.budget_gib:g}"
            )

    def _first_usable(self) -> tuple[list[Tensor], int] | None:
        """Mean tokens (1, 1, D) of the first usable chunk, and the values per image."""
        for chunk in self.source.chunks(range(num_chunks(self.source))):
            if chunk.number in self._chunk_numbers:
                self._read_ahead[chunk.number] = chunk
            _, maps = self._usable(chunk)
            if maps:
                pilots = [mean_token(m).view(1, 1, -1) for m in maps.values()]
                return pilots, sum(m[0].numel() for m in maps.values())
        return None

    def _usable(self, chunk: Chunk) -> tuple[Tensor, dict[Layer, Tensor]]:
        """Images and maps of a chunk, without images that have NaN, Inf or huge values."""
        usable = torch.ones(len(chunk.images), dtype=torch.bool)
        for layer, m in chunk.maps.items():
            largest = m.detach().flatten(1).abs().amax(1)
            good = (largest <= _LARGEST).cpu()  # False for NaN too
            for image in chunk.images[~good].tolist():
                name = self.source.name(image)
                message = f"{layer}: NaN, Inf or values above {_LARGEST:g} among the features"
                if self.config.on_bad == "error":
                    raise UnreadableError(f"{name}: {message}")
                self._left_out[name] = message
            usable &= good
        if usable.all():
            return chunk.images, chunk.maps
        maps = {layer: m[usable.to(m.device)] for layer, m in chunk.maps.items()}
        return chunk.images[usable], maps if usable.any() else {}

    # Between the passes.

    def _merged(self, part: _Part) -> _Part | None:
        """Merges an accumulator of all processes on process 0; None on the others."""
        merged = deepcopy(part)  # the states of the second pass need this process's part
        for state in self.context.gather(part.state_dict())[1:]:
            other = deepcopy(part)
            other.load_state_dict(state)
            merged.merge(other)
        return merged if self.context.is_main else None

    # Second pass.

    def _second_pass(self, interrupt: Interrupt) -> None:
        if self._kept is None and not self.source.repeatable:
            self._note(
                "captured energies are omitted: they need the features a second time, which were "
                "not kept, and no file is read twice; raise budget_gib or set keep to bf16"
            )
            self._captured = {}
            return
        for captured, state in zip(self._captured.values(), self._captured_states, strict=False):
            captured.load_state_dict(state)
        numbers = self._chunk_numbers[self._chunks_done :]
        if self._kept is not None:
            parts = map(self._kept.read, numbers, repeat(self.source.layers))
        else:
            parts = map(self._usable, self.source.chunks(numbers))
        with self._progress_bar() as bar:
            for images, maps in parts:
                for layer, m in maps.items():  # empty if no image of the chunk can be used
                    self._captured[layer].update(m, images)
                self._chunk_done(bar, interrupt)
        self._save()

    def _findings(
        self, merged: dict[Layer, LayerDiagnostics | None], images_per_s: float | None
    ) -> Findings | None:
        layers = {}
        for layer, stats in merged.items():
            captured = self._merged(self._captured[layer]) if self._captured else None
            if stats is None:
                continue
            try:
                result = stats.result()
                if captured is not None:
                    result = replace(result, captured=captured.result())
                layers[layer] = result
            except ValueError as error:  # the other layers are still reported
                self._note(f"{layer} is left out: {error}")
        left_out = self.context.merge_dicts(self._left_out)
        if not self.context.is_main:
            return None
        if not layers:
            raise UnreadableError("the features of all layers are zero")
        return Findings(
            layers=layers,
            names=[self.source.name(image) for image in range(self.source.num_images)],
            left_out=dict(sorted(left_out.items())),
            images=next(iter(layers.values())).images,
            images_per_s=images_per_s,
            notes=[*self.source.notes, *self._notes],
        )

    # States.

    def identity(self) -> dict[str, Any]:
        """Plain values that a state must share with this run to be resumed."""
        values = {
            **self.source.identity(),
            **asdict(self.config.settings),
            "keep": self.config.keep,
            "on_bad": self.config.on_bad,
            "processes": self.context.world_size,
            "featkd": featkd.__version__,
            "torch": str(torch.__version__),
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))  # the same for tuples and lists
        return plain

    def _chunk_done(self, bar: Any, interrupt: Interrupt) -> None:
        """Counts a chunk, saves the state if it is due, and raises Interrupted after a signal.

        No communication is needed: torchrun and a terminal signal every process.
        """
        bar.update(self._images_of(self._chunk_numbers[self._chunks_done :][:1]))
        self._chunks_done += 1
        started = time.monotonic()
        if interrupt.signal is not None or started >= self._next_save:
            self._save()
            # states grow with the images: saving takes at most a twentieth of the time
            saved = time.monotonic()
            self._next_save = saved + 20 * (saved - started) + self.config.save_seconds
        if interrupt.signal is not None:
            raise Interrupted(interrupt.signal)

    def _save(self) -> None:
        if self._kept is not None:
            self._kept.sync()
        state = {
            "pass": self._pass,
            "done": self._chunks_done,
            "calibration": self._calibration,
            "bad": self._left_out,
            "notes": self._notes,
            "layers": [stats.state_dict() for stats in self._stats.values()],
            "kept": self._kept is not None,
            "captured": [part.state_dict() for part in self._captured.values()],
        }
        save_state(self._state_path, self.identity(), state)

    def _resume(self) -> None:
        state = load_state(self._state_path, self.identity())
        if state is None:
            return
        self._pass, self._chunks_done = state["pass"], state["done"]
        self._left_out, self._notes = state["bad"], state["notes"]
        self._calibration = state["calibration"]
        for stats, part in zip(self._stats.values(), state["layers"], strict=True):
            stats.load_state_dict(part)
        if not state["kept"]:
            self._kept = None
        self._captured_states = state["captured"]

    # Counting.

    def _images_counted(self) -> int:
        return next(iter(self._stats.values())).images

    def _images_of(self, chunk_numbers: range) -> int:
        size, last = self.source.chunk_size, num_chunks(self.source) - 1
        missing = (last + 1) * size - self.source.num_images if last in chunk_numbers else 0
        return len(chunk_numbers) * size - missing

    def _progress_bar(self) -> Any:
        """Bar of one pass of process 0, which counts this process's images."""
        return tqdm(
            total=self._images_of(self._chunk_numbers),
            # images of a resumed run do not count into the rate
            initial=self._images_of(self._chunk_numbers[: self._chunks_done]),
            desc=("", "features", "captured energy")[self._pass],
            unit=" images",
            # None: no bar if stderr is no terminal
            disable=self.quiet or not self.context.is_main or None,
        )

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
