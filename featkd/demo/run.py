"""Train the demo's teacher and students, each by the same engine as any other run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from featkd.cli.diagnose import diagnose
from featkd.demo.digits import write_digits
from featkd.demo.report import DIAGNOSTICS, as_table, write_report
from featkd.demo.results import STUDENTS, RunResult, throughput
from featkd.runtime import distributed, environment
from featkd.train import checkpoint
from featkd.train.recipe import (
    LossConfig,
    Recipe,
    TeacherConfig,
    find_recipe,
    load_recipe,
    to_dict,
)
from featkd.train.trainer import Trainer


def run_demo(out: Path, seeds: int = 3, epochs: int | None = None) -> int:
    """Train a teacher, then plain, Lift and WideLast students of several seeds, on real digits.

    Runs found in `out` are taken up only where recipe and versions are the same. Prints a table,
    writes `out/report.html`, and diagnoses the maps of the teacher and the first student.

    Args:
        out: folder for the images, the runs and the report.
        seeds: seeds a student.
        epochs: epochs a run; None takes the recipe's.

    Returns:
        The exit code.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected a whole number >= 1, got {seeds}")
    started = time.perf_counter()
    write_digits(out / "digits")
    recipe = load_recipe(find_recipe("demo"))
    recipe.data = replace(recipe.data, path=str(out / "digits"))
    if epochs is not None:
        warmup = min(recipe.optim.warmup_epochs, epochs - 1)
        recipe.optim = replace(recipe.optim, epochs=epochs, warmup_epochs=warmup)
    alone = teacher_recipe(recipe, out / "teacher")
    same_teacher = keep_or_clear(alone)
    (teacher,) = train_all({("teacher", recipe.seed): alone}, "training the teacher")
    jobs = {
        (name, seed): student_recipe(recipe, name, seed, out, teacher)
        for seed in range(seeds)
        for name in STUDENTS
    }
    found = [keep_or_clear(job, wanted=same_teacher) for job in jobs.values()]
    results = train_all(jobs, "training the students")
    if any(found):
        print(f"{sum(found)} of {len(found)} students were found in {out}, begun or finished\n")
    table = as_table(teacher, results)
    seconds = time.perf_counter() - started
    page = write_report(out, recipe, teacher, results, seconds)
    print(f"{table}\n\n{seconds:.0f} s in all; report: {page}\n")
    return compare_maps(out, teacher, results[0])


def compare_maps(out: Path, teacher: RunResult, student: RunResult) -> int:
    """Diagnose the teacher's maps beside a student's on the validation images."""
    models = ("--teacher", teacher.folder / "last.pt", "--student", student.folder / "last.pt")
    where = ("--data", out / "digits" / "val", "--out", out / DIAGNOSTICS)
    how = ("--device", "cpu", "--workers", "0", "--batch-size", "36", "--resume", "never")
    return diagnose([str(word) for word in (*models, *where, *how)])


def keep_or_clear(recipe: Recipe, wanted: bool = True) -> bool:
    """Whether a run's folder can be gone on from; clears it where not.

    Args:
        recipe: the run.
        wanted: False clears it in any case.
    """
    last = Path(recipe.out) / "last.pt"
    if wanted and last.exists():
        try:
            state = checkpoint.load(last)
        except checkpoint.CheckpointError:  # of an older featkd
            state = {"recipe": None}
        same_recipe = state["recipe"] == to_dict(recipe)
        if same_recipe and state["versions"] == environment.versions():
            return True
    shutil.rmtree(recipe.out, ignore_errors=True)
    return False


def teacher_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The demo's teacher: the recipe's teacher model, trained alone as a plain student."""
    assert recipe.teacher is not None
    options = dict(recipe.teacher.options)
    student = replace(recipe.student, base=recipe.teacher.name, arch="plain", options=options)
    loss = LossConfig(label_smoothing=recipe.loss.label_smoothing)
    return replace(recipe, out=str(folder), student=student, teacher=None, loss=loss)


def student_recipe(recipe: Recipe, name: str, seed: int, out: Path, teacher: RunResult) -> Recipe:
    """One of `STUDENTS`: the recipe with that student and seed, and the trained teacher."""
    arch, distilled = STUDENTS[name]
    folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    student = replace(recipe.student, arch=arch)
    changed = replace(recipe, out=str(folder), seed=seed, student=student)
    if not distilled:
        loss = LossConfig(label_smoothing=recipe.loss.label_smoothing)
        return replace(changed, teacher=None, loss=loss)
    assert recipe.teacher is not None
    weights = str(teacher.folder / "last.pt")
    config: TeacherConfig = replace(recipe.teacher, checkpoint=weights, weights="model")
    return replace(changed, teacher=config)


def train(name: str, recipe: Recipe) -> RunResult:
    """Run one recipe in this process (going on from its checkpoint, if any)."""
    trainer = Trainer(recipe, distributed.start("cpu"))
    outcome = trainer.run(quiet=True)
    if outcome.interrupted_by is not None:
        raise KeyboardInterrupt
    return RunResult(
        name=name,
        seed=recipe.seed,
        parameters=sum(p.numel() for p in trainer.parts.student.parameters()),
        top1=outcome.scores["model"]["top1"],
        images_per_s=throughput(Path(recipe.out)),
        folder=Path(recipe.out),
    )


def train_all(jobs: dict[tuple[str, int], Recipe], what: str) -> list[RunResult]:
    """Run recipes side by side, one single-threaded process a core; results in the jobs' order.

    The models are so small that one run gains nothing from a second core.

    Args:
        jobs: (name, seed) -> recipe.
        what: what the progress bar says.
    """
    cores = len(os.sched_getaffinity(0))
    server = multiprocessing.get_context("forkserver")  # it imports once for all of them
    server.set_forkserver_preload(["featkd.train.trainer"])
    found: dict[tuple[str, int], RunResult] = {}
    with ProcessPoolExecutor(
        min(cores, len(jobs)), server, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running = {pool.submit(train, key[0], recipe): key for key, recipe in jobs.items()}
        try:
            for future in tqdm(as_completed(running), total=len(running), unit="run", desc=what):
                found[running[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # it saves what it has; Ctrl-C reached it by itself
            raise
    return [found[key] for key in jobs]
