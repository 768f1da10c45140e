"""The training loop: updates, evaluation, checkpoints, resuming, stopping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featkd.data import Batch
from featkd.losses import DistillationTerms
from featkd.runtime import environment
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.interrupt import Interrupt
from featkd.runtime.remote import Location, locate
from featkd.runtime.scores import describe, rank
from featkd.runtime.seeding import derive_seed
from featkd.train.cached_teacher import CachedTeacher
from featkd.train.checkpoint import CheckpointStore
from featkd.train.components import build
from featkd.train.logs import RunLog
from featkd.train.meter import Meter, Stopwatch, check_weights
from featkd.train.parallel import without_reduction
from featkd.train.recipe import Recipe, to_dict
from featkd.train.resume import check_same_position, find_checkpoint, restore
from featkd.train.saving import BackgroundSaver, snapshot
from featkd.train.teacher import begin_graph_step
from featkd.train.trackers import open_trackers
from featkd.train.validation import describe_validation, validate

_CHANGED = "changed since that checkpoint"


@dataclass
class Outcome:
    """Result of a run.

    Attributes:
        updates: optimizer updates done.
        scores: last evaluation: weights ("model", "ema") -> {"top1", "top5", "loss"}; see
            `featkd.train.validation.validate` for a run without labels.
        best: best evaluation, with its update, epoch and weights.
        images_per_s: training throughput of this process's session; NaN if nothing was trained.
        bad_files: unreadable images that were left out: path -> cause.
        interrupted_by: the signal that ended the run early, if any.
    """

    updates: int
    scores: dict[str, dict[str, float]]
    best: dict[str, Any]
    images_per_s: float
    bad_files: dict[str, str]
    interrupted_by: int | None = None


class Trainer:
    """Runs one training run in this process.

    An update never waits for the device, whose losses are read every `log_every` updates.

    Args:
        recipe: the run.
        context: this process.
        strict_classes: refuse a model with more outputs than there are class folders.
        resumes: `run` will be called with a checkpoint file, so starting weights are not needed.
    """

    def __init__(
        self,
        recipe: Recipe,
        context: ProcessContext,
        *,
        strict_classes: bool = True,
        resumes: bool = False,
    ) -> None:
        self.recipe = recipe
        self.context = context
        self.folder = locate(recipe.out)
        self.store = CheckpointStore(self.folder, recipe.checkpoint.keep_every)
        self.components = build(
            recipe,
            context,
            strict_classes=strict_classes,
            # `run` resumes from a checkpoint in the folder, or refuses the folder.
            starting_weights=not (resumes or self.store.last.exists()),
        )
        if recipe.data.labels == "none":
            self.components.notes.append(describe_validation(self.components))
        self.update = 0  # optimizer updates done
        self.epoch = 0  # epochs done
        self.batch = 0  # micro-batches done in the epoch
        self.evaluation_pending = False  # the epoch that has just ended is not evaluated yet
        self.best: dict[str, Any] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.bad_files: dict[str, str] = {}  # path -> cause
        self._last_checkpoint: Location | None = None  # saved by this run, or resumed from
        self._saver = BackgroundSaver()
        self._meter = Meter(context)
        self._stopwatch = Stopwatch()

    @property
    def total_updates(self) -> int:
        """Updates of the whole run: those done, and those left at the current batch size."""
        per_epoch = self.components.updates_per_epoch
        return self.update + per_epoch * self.recipe.optim.epochs - self._schedule_update

    @property
    def _position(self) -> str:
        """End of error messages."""
        last = self._last_checkpoint
        kept = "no checkpoint was saved" if last is None else f"the last checkpoint is {last}"
        return f"by update {self.update}; {kept}"

    @property
    def _schedule_update(self) -> int:
        """Position in the schedule; differs from `update` after a change of the global batch."""
        done = self.batch // self.recipe.optim.accumulate
        return self.epoch * self.components.updates_per_epoch + done

    def run(self, resume: str = "auto", *, quiet: bool = False) -> Outcome:
        """Trains to the end, or until SIGINT or SIGTERM, which also save a checkpoint.

        Args:
            resume: "auto" resumes from the last checkpoint in the output folder, if any, and
                refuses one of another experiment; "force" resumes with the changed recipe; "never"
                starts a new run and refuses a folder with a checkpoint; anything else is a
                checkpoint file, which the recipe may change.
            quiet: print warnings only.

        Raises:
            CheckpointError: a checkpoint can't be written, read or used, or another run writes to
                the output folder.
            RecipeError: the checkpoint belongs to another experiment.
            TrackerError: a tracker can't be started.
            TrainingDiverged: the loss or a weight is not finite; this state is not saved.
            featkd.data.BadImageError: an unreadable image under on_bad_image="error".
        """
        with self.store.opened(self.context):
            log = self._open_log(self._resume(resume), quiet=quiet)
            stopped_by, complete = None, False
            try:
                with Interrupt() as interrupt, self._saver.finishing(log.message):
                    if self.evaluation_pending:
                        self._evaluate_and_save(log)
                    while self.epoch < self.recipe.optim.epochs and stopped_by is None:
                        stopped_by = self._train_epoch(log, interrupt)
                    if stopped_by is not None:
                        self._save(log)
                    self.finish_saving()
                if stopped_by is not None:
                    text = f"stopped by signal {stopped_by}; --resume auto continues from here"
                    log.message(text)
                complete = stopped_by is None
            finally:
                log.close(complete=complete)
                self.components.close()
        return Outcome(
            updates=self.update,
            scores=self.scores,
            best=self.best,
            images_per_s=self._stopwatch.updates_per_s * self.components.global_batch,
            bad_files=self.bad_files,
            interrupted_by=stopped_by,
        )

    def _open_log(self, resume_messages: list[str], *, quiet: bool) -> RunLog:
        """Opens the logs at the run's position, and prints what the user should know."""
        loader = f"image loader: {self.components.train_loader.decoder}"
        messages = [loader, *self.components.notes, *resume_messages]
        resumed = self._last_checkpoint == self.store.last
        trackers = open_trackers(self.recipe, self.folder, self.context, resumed=resumed)
        messages += [f"{tracker.name}: {tracker.description}" for tracker in trackers]
        log = RunLog(
            self.folder if self.context.is_main else None,
            self.update,
            self.total_updates,
            quiet,
            evaluation_pending=self.evaluation_pending,
            trackers=trackers,
        )
        for message in (*messages, *log.notes):
            log.message(message, warning=message.startswith(_CHANGED) or message in log.notes)
        return log

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Micro-batches of an epoch from number `start` on; a cached teacher prefetches rows."""
        loader, teacher = self.components.train_loader, self.components.teacher
        loader.set_epoch(epoch, start)
        # Before the prefetch: workers forked while another thread holds a lock can hang.
        batches = iter(loader)
        if isinstance(teacher, CachedTeacher):
            teacher.prefetch(loader.upcoming())
        return batches

    def step(self, batches: list[Batch]) -> DistillationTerms:
        """Runs one update on `accumulate` micro-batches; returns the loss terms of the last."""
        components = self.components
        # Seeded by the update, so that a resumed run repeats drop-path exactly.
        torch.manual_seed(derive_seed(self.recipe.seed, self.update, self.context.rank))
        # timm ignores the one of the two that `optim.step_on` does not name.
        components.scheduler.step(self.epoch)
        components.scheduler.step_update(self._schedule_update)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else without_reduction(components.student_forward):
                terms = self.losses(batch, number)
                scaled: Tensor = components.scaler.scale(terms.total / len(batches))
                torch.autograd.backward(scaled)
            self._meter.add(terms)
        self.apply_gradients()
        self.update += 1
        self.batch += len(batches)
        return terms

    def losses(self, batch: Batch, number: int = 0) -> DistillationTerms:
        """Loss terms of a micro-batch, `number` within its update; mixes images if configured."""
        components = self.components
        if components.mixer is not None:
            number += self.batch  # within the epoch
            batch = components.mixer(batch, epoch=self.epoch, number=number, rank=self.context.rank)
        begin_graph_step(self.context.device)
        teacher = components.teacher_outputs(batch)
        student = components.student_outputs(batch.images, teacher)
        return components.compute_loss(student, batch.targets, teacher)

    def apply_gradients(self) -> None:
        """Clips gradients, updates weights and their average, and clears the gradients."""
        components, clip = self.components, self.recipe.optim.clip_grad
        if clip is not None:
            components.scaler.unscale_(components.optimizer)
            nn.utils.clip_grad_norm_(components.parameters, clip)
        components.scaler.step(components.optimizer)
        components.scaler.update()
        components.optimizer.zero_grad(set_to_none=True)
        if components.ema is not None:
            components.ema.update(components.student)

    def _train_epoch(self, log: RunLog, interrupt: Interrupt) -> int | None:
        """Trains the rest of the current epoch; returns the signal that stopped it, if any."""
        components, recipe = self.components, self.recipe
        components.student.train()
        last_batch = components.updates_per_epoch * recipe.optim.accumulate
        pending: list[Batch] = []
        self._stopwatch.start()
        for batch in self.batches(self.epoch, self.batch):
            self._report_bad_images(components.train_loader.bad_images, log)
            pending.append(batch)
            if len(pending) < recipe.optim.accumulate:
                continue
            self.step(pending)
            pending = []
            self._stopwatch.updates += 1
            log.advance()
            if self.update % recipe.log_every == 0 or self.batch == last_batch:
                self._log(log)
                self._saver.check()
            if self.batch == last_batch:
                continue  # exhausts the loader: a DALI pipeline starts its next epoch only then
            stopped_by = interrupt.stop_signal(self.context.any_true)
            if stopped_by is not None:
                return stopped_by
            every = recipe.checkpoint.every_updates
            if every is not None and self.update % every == 0:
                with self._stopwatch.paused():
                    self._save(log)
        self.epoch += 1
        self.batch = 0
        components.train_loader.set_epoch(self.epoch)
        ended = self.epoch == recipe.optim.epochs
        if ended or self.epoch % recipe.checkpoint.every_epochs == 0:
            # Saved before the evaluation too, so that a failing evaluation loses no training.
            self.evaluation_pending = True
            self._save(log)
            self._evaluate_and_save(log)
        return None if ended else interrupt.stop_signal(self.context.any_true)

    def _log(self, log: RunLog) -> None:
        """Reads and logs the mean losses; the only place where training waits for the device."""
        means = self._meter.means(self._position)
        self._meter.clear()
        updates_per_s = self._stopwatch.lap()
        log.train(
            {
                "update": self.update,
                "epoch": self.epoch,
                "lr": max(group["lr"] for group in self.components.optimizer.param_groups),
                **means._asdict(),
                "images_per_s": round(updates_per_s * self.components.global_batch, 1),
            }
        )

    def _evaluate_and_save(self, log: RunLog) -> None:
        """Evaluates the epoch that has ended, and saves it with its scores."""
        improved = self._evaluate(log)
        self.evaluation_pending = False
        self._save(log, is_best=improved, ended_epoch=self.epoch)

    def _evaluate(self, log: RunLog) -> bool:
        """Evaluates the weights and their average; returns True for a new best score."""
        before = self.best
        for weights, found in validate(self.components).items():
            images = found.pop("images")
            self.scores[weights] = found
            row: dict[str, Any] = {"update": self.update, "epoch": self.epoch}
            row |= {"weights": weights, **found}
            log.evaluation({**row, "images": images})
            if not self.best or rank(row) > rank(self.best):
                self.best = row
        self._report_bad_images(self.components.val_loader.bad_images, log)
        self._report_bad_images(self.context.merge_dicts(self.bad_files), log)
        return self.best is not before

    def _report_bad_images(self, files: Mapping[str, str], log: RunLog) -> None:
        """Reports each unreadable image once (under on_bad_image="skip")."""
        for path, cause in files.items():
            if path not in self.bad_files:
                self.bad_files[path] = cause
                text = f"unreadable image no. {len(self.bad_files)}, left out: {path}: {cause}"
                log.message(text, warning=True)

    def _save(self, log: RunLog, *, is_best: bool = False, ended_epoch: int | None = None) -> None:
        """Starts to save a checkpoint; training goes on while it is written."""
        self.finish_saving()
        meter = self._meter.state_dict(self._position)  # a collective: all processes call it
        check_weights(self.components.parameters, self._position)
        bad_files = self.context.merge_dicts(self.bad_files)
        state = snapshot(
            {
                **self.components.state_dict(),
                **meter,
                "update": self.update,
                "epoch": self.epoch,
                "best": self.best,
                "scores": self.scores,
                "evaluation_pending": self.evaluation_pending,
                "bad_files": bad_files,
                "recipe": to_dict(self.recipe),
                "versions": environment.versions(),
                "world_size": self.context.world_size,
                "job": self.context.job,
            },
            keep=self.context.is_main,
        )
        if self.context.is_main:
            save = partial(self.store.save, state, is_best=is_best, ended_epoch=ended_epoch)
            self._saver.start(log.publish, save)
        self._last_checkpoint = self.store.last

    def finish_saving(self) -> None:
        """Waits until the last checkpoint is written; all processes must call it.

        Raises:
            CheckpointError: it can't be written; raised on all processes.
        """
        self.context.on_main(self._saver.wait)  # without NCCL, which ends processes that wait

    def _resume(self, resume: str) -> list[str]:
        """Restores the checkpoint that `resume` selects, if any; returns messages for the user."""
        path = find_checkpoint(resume, self.store, self.context)
        if path is None:
            check_same_position(self.context, "the start")
            return []
        forced = resume not in ("auto", "never")
        state, changed = restore(path, self.components, force=forced)
        position = self.components.train_loader.state_dict()
        self.update, self.epoch, self.batch = state["update"], position["epoch"], position["batch"]
        self._last_checkpoint = path
        self.evaluation_pending = state["evaluation_pending"]
        place = f"{path} after update {self.update} (epoch {self.epoch}, batch {self.batch})"
        pending = ", to be evaluated" if self.evaluation_pending else ""
        check_same_position(self.context, f"{place}{pending}")
        self.best = self.context.on_main(lambda: self.store.restore_best(path, state))
        self.scores = state["scores"]
        self.bad_files = state["bad_files"]
        self._meter.load_state_dict(state)
        messages = [f"resumed from {path} after update {self.update} (epoch {self.epoch})"]
        if self.best != state["best"]:
            scores = f"{describe(self.best)}, not {describe(state['best'])} as in that checkpoint"
            messages.append(f"{self.store.best}: the best score is {scores}")
        if changed:
            messages.append(f"{_CHANGED}: {'; '.join(changed)}")
        return messages
