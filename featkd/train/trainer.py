"""The training loop: updates, evaluation, checkpoints, resuming, stopping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featkd.cache import Taught
from featkd.data import Batch
from featkd.losses import DistillationTerms
from featkd.models.features import FeatureModel
from featkd.runtime import environment
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.interrupt import Interrupt
from featkd.runtime.remote import locate
from featkd.runtime.seeding import derive_seed
from featkd.train.cached_teacher import OpenCache
from featkd.train.checkpoint import CheckpointStore
from featkd.train.components import Parts, build
from featkd.train.evaluate import evaluate
from featkd.train.logs import RunLog
from featkd.train.meter import Meter, check_weights
from featkd.train.precision import autocast
from featkd.train.recipe import Recipe, to_dict
from featkd.train.resume import check_alike, find_checkpoint, restore
from featkd.train.stopwatch import Stopwatch


class Learnt(NamedTuple):
    """What the student says of it; with `feature_loss`, a scalar, there are no maps."""

    logits: Tensor
    maps: list[Tensor]
    feature_loss: Tensor | None


@dataclass
class Outcome:
    """How a run ended.

    `scores` holds the last evaluation: weights ("model", "ema") -> {"top1", "top5", "loss"};
    `bad_files` the images that were left out: path -> cause.
    """

    updates: int
    scores: dict[str, dict[str, float]]
    best: dict[str, Any]
    images_per_s: float
    bad_files: dict[str, str]
    interrupted_by: int | None = None


class Trainer:
    """One training run in this process.

    Nothing in an update waits for the device: losses are summed there and read only every
    `log_every` updates.

    Args:
        recipe: the run.
        context: this process's place.
        strict_classes: refuse a model with more outputs than there are class folders.
    """

    def __init__(
        self, recipe: Recipe, context: ProcessContext, *, strict_classes: bool = True
    ) -> None:
        self.recipe = recipe
        self.context = context
        self.folder = locate(recipe.out)
        self.parts: Parts = build(recipe, context, strict_classes=strict_classes)
        self.store = CheckpointStore(self.folder, recipe.checkpoint.keep_every)
        self.update = 0  # optimizer updates done
        self.epoch = 0  # epochs done
        self.batch = 0  # micro-batches done in the epoch
        self.due = False  # the epoch that has just ended is still to be evaluated
        self.best: dict[str, Any] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.bad_files: dict[str, str] = {}  # path -> cause
        self._meter = Meter(context)
        self._seconds = 0.0
        self._timed_updates = 0

    @property
    def total_updates(self) -> int:
        """Updates of the whole run: those done, with however many processes, and those to come."""
        left = self.parts.updates_per_epoch * self.recipe.optim.epochs - self._scheduled
        return self.update + left

    @property
    def _so_far(self) -> str:
        return f"by update {self.update}; the last checkpoint is {self.store.last}"

    @property
    def _scheduled(self) -> int:
        """Updates that lead here at the present size of an update: `update`, if none was other."""
        done = self.batch // self.recipe.optim.accumulate
        return self.epoch * self.parts.updates_per_epoch + done

    def run(self, resume: str = "auto", *, quiet: bool = False) -> Outcome:
        """Train to the end, or until SIGINT or SIGTERM, which leave a checkpoint.

        Args:
            resume: "auto" goes on from the output folder's last checkpoint where there is one,
                "never" starts anew (refused where there is one), else a checkpoint file.
            quiet: print nothing.

        Raises:
            CheckpointError: a checkpoint can't be written, read or used.
            TrainingDiverged: the loss or a weight is not finite; nothing is saved then.
            featkd.data.BadImageError: an unreadable image under on_bad_image="error".
        """
        if self.context.is_main:
            self.store.prepare()
        self.context.barrier()
        loads = f"images are loaded by {self.parts.train_loader.pixels}"
        messages = [loads, *self.parts.notes, *self._resume(resume)]
        folder = self.folder if self.context.is_main else None
        log = RunLog(folder, self.update, self.total_updates, quiet, due=self.due)
        for message in messages:
            log.say(message)
        stopped_by = None
        try:
            with Interrupt() as interrupt:
                if self.due:
                    self._score(log)
                while self.epoch < self.recipe.optim.epochs and stopped_by is None:
                    stopped_by = self._train_epoch(log, interrupt)
                if stopped_by is not None:
                    self._save(log)
                    log.say(f"stopped by signal {stopped_by}; --resume auto goes on from here")
        finally:
            log.close()
            self.parts.close()
        images = self._timed_updates * self.parts.global_batch
        return Outcome(
            updates=self.update,
            scores=self.scores,
            best=self.best,
            images_per_s=images / self._seconds if self._seconds else math.nan,
            bad_files=self.bad_files,
            interrupted_by=stopped_by,
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's micro-batches from number `start` on; a cache reads their rows ahead."""
        loader, source = self.parts.train_loader, self.parts.source
        loader.set_epoch(epoch, start)
        batches = iter(loader)  # first: a process that is forked beside busy threads can hang
        if isinstance(source, OpenCache):
            source.expect(loader.upcoming())
        return batches

    def step(self, batches: list[Batch]) -> DistillationTerms:
        """One optimizer update from `accumulate` micro-batches; returns the last one's terms."""
        parts, recipe = self.parts, self.recipe
        # Drop-path and the like depend on the update alone: a resumed run repeats them exactly.
        torch.manual_seed(derive_seed(recipe.seed, self.update, self.context.rank))
        self._set_lr()
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self._no_sync(not last):
                terms = self.losses(batch, number)
                scaled: Tensor = parts.scaler.scale(terms.total / len(batches))
                torch.autograd.backward(scaled)
            self._meter.add(terms)
        self.apply_gradients()
        self.update += 1
        self.batch += len(batches)
        return terms

    def losses(self, batch: Batch, number: int = 0) -> DistillationTerms:
        """The objective of an update's micro-batch of that number, mixed where the recipe says."""
        if self.parts.mixer is not None:
            number += self.batch  # in the epoch
            batch = self.parts.mixer(batch, epoch=self.epoch, number=number, rank=self.context.rank)
        batch = batch._replace(
            images=batch.images.to(self.context.device, non_blocking=True),
            targets=batch.targets.to(self.context.device, non_blocking=True),
        )
        if self.context.device.type == "cuda":  # what CUDA graphs gave before is used up
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        taught = self.teach(batch)
        return self.compare(self.learn(batch.images, taught), batch.targets, taught)

    def teach(self, batch: Batch) -> Taught:
        """The teacher's logits and maps of a batch on the device; nothing without a teacher."""
        source = self.parts.source
        return Taught(None, []) if source is None else source.teach(batch)

    def learn(self, images: Tensor, taught: Taught) -> Learnt:
        """The student's logits and maps, or its feature loss where it forms that itself."""
        with self._autocast():
            if self.parts.student_forms_loss:
                (teacher_map,) = taught.maps
                logits, distance = self.parts.student_forward(images, teacher_map)
                return Learnt(logits, [], distance)
            logits, maps = self.parts.student_forward(images)
            return Learnt(logits, maps, None)

    def compare(self, learnt: Learnt, targets: Tensor, taught: Taught) -> DistillationTerms:
        """The objective of a student's outputs."""
        loss = self.parts.loss
        with self._autocast():
            terms = loss(
                *(learnt.logits, targets, taught.logits, learnt.maps, taught.maps),
                feature_loss=learnt.feature_loss,
            )
        assert isinstance(terms, DistillationTerms)
        return terms

    def apply_gradients(self) -> None:
        """Clip, update the weights, drop the gradients, and let the weight average follow."""
        parts, clip = self.parts, self.recipe.optim.clip_grad
        if clip is not None:
            parts.scaler.unscale_(parts.optimizer)
            nn.utils.clip_grad_norm_(parts.student.parameters(), clip)
        parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)
        if parts.ema is not None:
            parts.ema.update(parts.student)

    def _train_epoch(self, log: RunLog, interrupt: Interrupt) -> int | None:
        """Train the rest of the current epoch; returns the signal that stopped it, if any."""
        parts, recipe = self.parts, self.recipe
        parts.student.train()
        last_batch = parts.updates_per_epoch * recipe.optim.accumulate
        pending: list[Batch] = []
        watch = Stopwatch()
        for batch in self.batches(self.epoch, self.batch):
            self._name_bad(parts.train_loader.bad_images, log)
            pending.append(batch)
            if len(pending) < recipe.optim.accumulate:
                continue
            self.step(pending)
            pending = []
            watch.updates += 1
            log.advance()
            if self.update % recipe.log_every == 0 or self.batch == last_batch:
                self._log(log, watch)
            if self.batch == last_batch:
                continue  # to the loader's end: a DALI pipeline goes on from there, not from before
            stopped_by = interrupt.agreed(self.context.any_true)
            if stopped_by is not None:
                return stopped_by
            every = recipe.checkpoint.every_updates
            if every is not None and self.update % every == 0:
                with watch.paused():
                    self._save(log)
        self.epoch += 1
        self.batch = 0
        parts.train_loader.set_epoch(self.epoch)
        ended = self.epoch == recipe.optim.epochs
        if ended or self.epoch % recipe.checkpoint.every_epochs == 0:
            # First the state alone: an evaluation that fails must not cost the epoch.
            self.due = True
            self._save(log)
            self._score(log)
        return None if ended else interrupt.agreed(self.context.any_true)

    def _set_lr(self) -> None:
        if self.recipe.optim.step_on == "epoch":
            self.parts.scheduler.step(self.epoch)
        else:
            self.parts.scheduler.step_update(self._scheduled)

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.recipe.amp, self.context.device)

    def _no_sync(self, active: bool) -> AbstractContextManager[object]:
        """Without DDP's gradient all-reduce, for all micro-batches but an update's last."""
        forward = self.parts.student_forward
        if active and isinstance(forward, nn.parallel.DistributedDataParallel):
            return forward.no_sync()
        return nullcontext()

    def _log(self, log: RunLog, watch: Stopwatch) -> None:
        """The one place where training waits for the device: read the summed losses."""
        means = self._meter.means(self._so_far)
        self._meter.clear()
        seconds, updates = watch.lap()
        self._seconds += seconds
        self._timed_updates += updates
        log.train(
            {
                "update": self.update,
                "epoch": self.epoch,
                "lr": max(group["lr"] for group in self.parts.optimizer.param_groups),
                "loss": means.loss,
                "logits_loss": means.logits,
                "feature_loss": means.features,
                "images_per_s": round(updates * self.parts.global_batch / seconds, 1),
            }
        )

    def _score(self, log: RunLog) -> None:
        """Evaluate the epoch that has ended, and save it under all its names."""
        improved = self._evaluate(log)
        self.due = False
        self._save(log, is_best=improved, ended_epoch=self.epoch)

    def _evaluate(self, log: RunLog) -> bool:
        """Score the weights and their average; returns whether either is the best so far."""
        parts = self.parts
        models: dict[str, FeatureModel] = {"model": parts.student}
        if parts.ema is not None:
            models["ema"] = parts.ema.module
        improved = False
        evaluations = evaluate(
            models, parts.val_loader, parts.num_classes, self.context.device, self._autocast
        )
        for weights, found in evaluations.items():
            scores = {"top1": found.top1, "top5": found.top5, "loss": found.loss}
            self.scores[weights] = scores
            row: dict[str, Any] = {"update": self.update, "epoch": self.epoch, "weights": weights}
            log.evaluation({**row, **scores, "images": found.images})
            if not self.best or found.top1 > self.best["top1"]:
                self.best = {**row, **scores}
                improved = True
        self._name_bad(parts.val_loader.bad_images, log)
        self._name_bad(self.context.merged(self.bad_files), log)
        return improved

    def _name_bad(self, files: Mapping[str, str], log: RunLog) -> None:
        """Name each unreadable image once (under on_bad_image="skip")."""
        for path, cause in files.items():
            if path not in self.bad_files:
                self.bad_files[path] = cause
                log.say(f"unreadable image no. {len(self.bad_files)}, left out: {path}: {cause}")

    def _save(self, log: RunLog, *, is_best: bool = False, ended_epoch: int | None = None) -> None:
        parts = self.parts
        meter = self._meter.state_dict(self._so_far)  # all processes take part
        check_weights(parts.student.parameters(), self._so_far)
        log.publish()
        bad_files = self.context.merged(self.bad_files)
        if self.context.is_main:
            state = {
                "model": parts.student.state_dict(),
                "model_ema": None if parts.ema is None else parts.ema.module.state_dict(),
                "optimizer": parts.optimizer.state_dict(),
                "scaler": parts.scaler.state_dict(),
                "update": self.update,
                "epoch": self.epoch,
                "loader": parts.train_loader.state_dict(),
                "pixels": parts.train_loader.pixels,
                **meter,
                "best": self.best,
                "scores": self.scores,
                "due": self.due,
                "bad_files": bad_files,
                "recipe": to_dict(self.recipe),
                "classes": parts.train_loader.classes,
                "num_classes": parts.num_classes,
                "versions": environment.versions(),
                "world_size": self.context.world_size,
                "job": self.context.job,
            }
            self.store.save(state, is_best=is_best, ended_epoch=ended_epoch)
        self.context.barrier()

    def _resume(self, resume: str) -> list[str]:
        """Take up a checkpoint where `resume` asks for one; returns what the user should know."""
        path = find_checkpoint(resume, self.store, self.context)
        if path is None:
            check_alike(self.context, "the start")
            return []
        state, changed = restore(path, self.parts, self.recipe, self.context.world_size)
        position = self.parts.train_loader.state_dict()
        self.update, self.epoch, self.batch = state["update"], position["epoch"], position["batch"]
        self.due = state.get("due", False)  # earlier checkpoints were all evaluated
        place = f"{path} after update {self.update} (epoch {self.epoch}, batch {self.batch})"
        check_alike(self.context, f"{place}, to be evaluated" if self.due else place)
        brought = self.store.bring_best(path, state) if self.context.is_main else None
        self.best, self.scores = self.context.broadcast(brought), state["scores"]
        self.bad_files = state["bad_files"]
        self._meter.load_state_dict(state)
        messages = [f"resumed from {path} after update {self.update} (epoch {self.epoch})"]
        if self.best != state["best"]:
            messages.append(
                f"{self.store.best}: the score to be beaten is {self.best.get('top1', 'none')}, "
                f"not {state['best'].get('top1', 'none')} as in that checkpoint"
            )
        if changed:
            messages.append(f"changed since that checkpoint: {'; '.join(changed)}")
        return messages
