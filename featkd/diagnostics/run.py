"""A run over all images: two passes, states that survive a kill, processes that share the work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import featkd
from featkd.diagnostics.findings import Findings, RunOptions
from featkd.diagnostics.kept import KEPT_FILES, KeptFeatures
from featkd.diagnostics.pca import CapturedEnergy, PCAResult, mean_token
from featkd.diagnostics.source import Chunk, Layer, Source, UnreadableError, num_chunks
from featkd.diagnostics.state import STATE_FILES, load_state, save_state, state_path
from featkd.diagnostics.stream import LayerDiagnostics, LayerResult, Settings
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.files import remove_leftovers
from featkd.runtime.interrupt import Interrupt

_GIB = 2**30
_LARGEST = 1e17  # the squares of more leave float32


class DiagnosticsRun:
    """One process's part of a run.

    Chunk c of the images is computed by process c mod the number of processes, and all sums are
    exact, so that the figures don't depend on that number, nor on kills and resumes.

    Args:
        source: where the maps come from.
        settings, options: what is measured, and how.
        folder: for states and kept features; made if missing, emptied at the end.
        context: this process.
        progress: called with (pass, images done, images in all), both this process's.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        options: RunOptions,
        folder: Path,
        context: ProcessContext,
        progress: Callable[[int, int, int], None] = lambda *_: None,
    ) -> None:
        self.source = source
        self.settings = settings
        self.options = options
        self.context = context
        self.progress = progress
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if context.is_main:
            remove_leftovers(folder)
        self._path = state_path(folder, context.rank, context.world_size)
        self._numbers = range(context.rank, num_chunks(source), context.world_size)
        self._stats = {layer: self._new_stats() for layer in source.layers}
        self._kept: KeptFeatures | None = None
        if options.keep != "never":
            self._kept = KeptFeatures(folder, context.rank, options.keep)
        self._captured: dict[Layer, CapturedEnergy] = {}
        self._bad: dict[str, str] = {}
        self._calibrated = False
        self._held: list[Chunk] = []  # read for the calibration, and still to be counted
        self._pass = 1
        self._done = 0  # chunks of this pass
        self._second: dict[Layer, Any] = {}
        self._saved_at = time.monotonic()
        self._notes: list[str] = []

    def run(self) -> Findings | int | None:
        """Do the work, or what is left of it.

        Returns:
            The findings on process 0 and None on the others; the number of the signal that ended
            the run early, with its state saved.

        Raises:
            UnreadableError: features that can't be used, with on_bad "error".
            StateError: the state in the folder is of another run.
            OSError: the disk is full; the last state is whole.
        """
        if self.options.resume:
            self._resume()
        else:
            self._remove_all()
        with Interrupt() as interrupt:
            self._calibrate()
            started, before = time.monotonic(), self._seen()
            if self._pass == 1 and not self._first_pass(interrupt):
                return interrupt.signal
            seconds, seen = time.monotonic() - started, self._seen() - before
            speed = seen / seconds if seen else None
            if not self.context.any_true(self._seen() > 0):
                raise UnreadableError("none of the images could be used")
            merged = self._merged()
            if not self._second_pass(self._broadcast_axes(merged), interrupt):
                return interrupt.signal
        return self._findings(merged, speed)

    def clear(self) -> None:
        """Remove all states and kept features, once the results are safe."""
        self._remove_all()
        with contextlib.suppress(OSError):  # something of somebody else's lies there
            if self.context.is_main:
                self._folder.rmdir()

    def _remove_all(self) -> None:
        """What runs of any number of processes left."""
        self.context.barrier()
        if self.context.is_main:
            # states first: one without its features can't be resumed
            for pattern in (STATE_FILES, KEPT_FILES):
                for path in self._folder.glob(pattern):
                    path.unlink(missing_ok=True)
        self.context.barrier()

    # The first pass.

    def _first_pass(self, interrupt: Interrupt) -> bool:
        self._report_progress()
        for chunk in self._chunks():
            self._bad.update(chunk.bad)
            images, maps = self._usable(chunk)
            if len(images):
                for layer, m in maps.items():
                    self._stats[layer].update(m, images)
                if self._kept is not None:
                    self._kept.append(maps, images)
            self._done += 1
            self._report_progress()
            if self._stop(interrupt):
                return False
        self._pass, self._done = 2, 0
        self._save()
        return True

    def _chunks(self) -> Iterator[Chunk]:
        """This process's chunks from where it is, those first that the calibration took."""
        left = list(self._numbers[self._done + len(self._held) :])
        while self._held:
            yield self._held.pop(0)
        yield from self.source.chunks(left)

    def _calibrate(self) -> None:
        """The pilots of all processes, by what process 0 reads: the first usable chunk of all."""
        if not self.context.any_true(not self._calibrated):
            return
        first = self.context.broadcast(self._first_usable() if self.context.is_main else None)
        if first is None or self._calibrated:
            return
        pilots, numbers = first
        for layer, pilot in pilots.items():
            self._stats[layer].calibrate(pilot)
        size = {"fp32": 4, "bf16": 2, "never": 0}[self.options.keep]
        needed = self.source.num_images * size * numbers / _GIB
        if needed > self.options.budget_gib:
            self._kept = None
            self._note(
                f"keeping all features takes {needed:.3g} GiB, more than the budget of "
                f"{self.options.budget_gib:g} GiB"
            )
        self._calibrated = True

    def _first_usable(self) -> tuple[dict[Layer, Tensor], int] | None:
        """Mean tokens (1, 1, D), and the numbers in an image's maps; keeps the chunks it reads."""
        left = self._numbers[self._done :] if self._pass == 1 else range(0)
        for chunk in self.source.chunks(range(num_chunks(self.source))):
            if chunk.number in left:
                self._held.append(chunk)
            _, maps = self._usable(chunk)
            if maps:
                pilots = {layer: mean_token(m).view(1, 1, -1) for layer, m in maps.items()}
                return pilots, sum(m[0].numel() for m in maps.values())
        return None

    def _usable(self, chunk: Chunk) -> tuple[Tensor, dict[Layer, Tensor]]:
        """Images and maps without those that hold NaN, Inf or the like in any layer."""
        if not len(chunk.images):
            return chunk.images, {}
        finite = torch.ones(len(chunk.images), dtype=torch.bool)
        for layer, m in chunk.maps.items():
            largest = m.detach().flatten(1).abs().amax(1)
            good = (largest <= _LARGEST).cpu()  # and False where it is NaN
            for image in chunk.images[~good].tolist():
                name = self.source.name(image)
                message = f"{layer}: NaN, Inf or numbers above {_LARGEST:g} among the features"
                if self.options.on_bad == "error":
                    raise UnreadableError(f"{name}: {message}")
                self._bad[name] = message
            finite &= good
        if finite.all():
            return chunk.images, chunk.maps
        maps = {layer: m[finite.to(m.device)] for layer, m in chunk.maps.items()}
        return chunk.images[finite], maps if finite.any() else {}

    # Between the passes.

    def _merged(self) -> dict[Layer, LayerDiagnostics]:
        """On process 0: what all processes saw; nothing on the others."""
        merged = {}
        for layer, stats in self._stats.items():
            states = self.context.gather(stats.state_dict())
            if states:
                merged[layer] = self._new_stats()
            for state in states:
                part = self._new_stats()
                part.load_state_dict(state)
                merged[layer].merge(part)
        return merged

    def _broadcast_axes(self, merged: dict[Layer, LayerDiagnostics]) -> dict[Layer, PCAResult]:
        return {
            layer: self.context.broadcast(merged[layer].pca() if merged else None)
            for layer in self.source.layers
        }

    # The second pass.

    def _second_pass(self, axes: dict[Layer, PCAResult], interrupt: Interrupt) -> bool:
        for layer, pca in axes.items():
            self._captured[layer] = CapturedEnergy(pca, self.settings.thresholds)
            if layer in self._second:
                self._captured[layer].load_state_dict(self._second[layer])
        if self._kept is None and not self.source.repeatable:
            self._captured = {}
            self._note(
                "captured energies are left out: they need the features a second time, which were "
                "not kept, and no file is read twice; raise the budget, or keep bf16"
            )
            return True
        if self._kept is not None:
            parts = self._kept.read(self._done)
        else:
            numbers = list(self._numbers[self._done :])
            parts = (
                (maps, images) for images, maps in map(self._usable, self.source.chunks(numbers))
            )
        self._report_progress()
        for maps, images in parts:
            for layer, m in maps.items():  # none where no image of a chunk could be used
                self._captured[layer].update(m, images)
            self._done += 1
            self._report_progress()
            if self._stop(interrupt):
                return False
        self._save()
        return True

    def _findings(
        self, merged: dict[Layer, LayerDiagnostics], speed: float | None
    ) -> Findings | None:
        found = {}
        for layer in self.source.layers:
            states = (
                self.context.gather(self._captured[layer].state_dict()) if self._captured else []
            )
            if not self.context.is_main:
                continue
            try:
                found[layer] = self._figures(merged[layer], states)
            except ValueError as error:  # one dead layer must not cost the others' report
                self._note(f"{layer} is left out: {error}")
        bad = self.context.merged(self._bad)
        if not self.context.is_main:
            return None
        if not found:
            raise UnreadableError("the features of all layers are zero")
        return Findings(
            layers=found,
            names=[self.source.name(image) for image in range(self.source.num_images)],
            bad=dict(sorted(bad.items())),
            images=next(iter(found.values())).images,
            images_per_s=speed,
            notes=[*self.source.notes, *self._notes],
        )

    def _figures(self, stats: LayerDiagnostics, states: list[dict[str, Any]]) -> LayerResult:
        """One layer's, with the second pass of all processes where there was one."""
        result = stats.result()
        if not states:
            return result
        captured = CapturedEnergy(result.pca, self.settings.thresholds)
        for state in states:
            part = CapturedEnergy(result.pca, self.settings.thresholds)
            part.load_state_dict(state)
            captured.merge(part)
        return replace(result, captured=captured.result())

    # States.

    def identity(self) -> dict[str, Any]:
        """What a state must agree with, by field."""
        return {
            **self.source.identity(),
            **asdict(self.settings),
            "keep": self.options.keep,
            "on_bad": self.options.on_bad,
            "processes": self.context.world_size,
            "featkd": featkd.__version__,
            "torch": str(torch.__version__),
        }

    def _stop(self, interrupt: Interrupt) -> bool:
        """Save a state where a signal came or it is time to; whether a signal came.

        Every process looks for itself: torchrun and a terminal signal all of them.
        """
        stop = interrupt.signal is not None
        if stop or time.monotonic() - self._saved_at >= self.options.save_seconds:
            started = time.monotonic()
            self._save()
            # states grow with the images: no more than a twentieth of the time goes into them
            self._saved_at = time.monotonic() + 20 * (time.monotonic() - started)
        return stop

    def _save(self) -> None:
        if self._kept is not None:
            self._kept.sync()
        state = {
            "pass": self._pass,
            "done": self._done,
            "calibrated": self._calibrated,
            "bad": self._bad,
            "notes": self._notes,
            "layers": [stats.state_dict() for stats in self._stats.values()],
            "kept": None if self._kept is None else self._kept.state_dict(),
            "captured": [part.state_dict() for part in self._captured.values()],
        }
        save_state(self._path, self.identity(), state)

    def _resume(self) -> None:
        state = load_state(self._path, self.identity())
        if state is None:
            if self._kept is not None:
                self._kept.remove()  # of a run that ended before its first state
            return
        self._pass, self._done, self._bad = state["pass"], state["done"], state["bad"]
        self._calibrated, self._notes = state["calibrated"], state["notes"]
        for stats, part in zip(self._stats.values(), state["layers"], strict=True):
            stats.load_state_dict(part)
        if state["kept"] is None:
            self._kept = None
        elif self._kept is not None:
            self._kept.load_state_dict(state["kept"])
        if state["captured"]:
            self._second = dict(zip(self.source.layers, state["captured"], strict=True))

    # Small things.

    def _new_stats(self) -> LayerDiagnostics:
        return LayerDiagnostics(self.settings, self.options.compiled)

    def _seen(self) -> int:
        return next(iter(self._stats.values())).images

    def _images_of(self, numbers: range) -> int:
        size, last = self.source.chunk_size, num_chunks(self.source) - 1
        short = (last + 1) * size - self.source.num_images if last in numbers else 0
        return len(numbers) * size - short

    def _report_progress(self) -> None:
        done = self._images_of(self._numbers[: self._done])
        self.progress(self._pass, done, self._images_of(self._numbers))

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
