"""Trains the demo's teacher and students with the trainer of `featkd distill`."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import torch
from tqdm import tqdm

from featkd.data.workers import end_with_parent
from featkd.demo.digits import write_digits
from featkd.demo.report import DIAGNOSTICS, as_table, write_report
from featkd.demo.results import STUDENTS, RunResult, throughput
from featkd.diagnostics import DiagnoseConfig, diagnose
from featkd.diagnostics.process_run import Interrupted
from featkd.runtime import distributed, environment
from featkd.runtime.interrupt import Interrupt
from featkd.runtime.names import plural
from featkd.train import checkpoint
from featkd.train.recipe import LossConfig, Recipe, TeacherConfig, to_dict
from featkd.train.recipe_file import find_recipe, load_recipe
from featkd.train.trainer import Trainer


def run_demo(out: Path, seeds: int = 3, epochs: int | None = None, *, quiet: bool = False) -> int:
    """Trains a teacher, then plain, Lift and WideLast students of several seeds, on real digits.

    Prints a table, writes `out/report.html`, and diagnoses the feature maps of the teacher and the
    first student. Runs in `out` are continued if their recipe and versions are the same.

    Args:
        out: folder for the images, the runs and the report.
        seeds: seeds per student.
        epochs: epochs per run; None uses the recipe's.
        quiet: show no progress bars.

    Returns:
        The exit code.

    Raises:
        ValueError: `seeds` is below 1.
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
    (teacher,) = train_all({("teacher", recipe.seed): alone}, "training the teacher", quiet)
    jobs = {
        (name, seed): student_recipe(recipe, name, seed, out, teacher)
        for seed in range(seeds)
        for name in STUDENTS
    }
    kept = [keep_or_clear(job, wanted=same_teacher) for job in jobs.values()]
    results = train_all(jobs, "training the students", quiet)
    if any(kept):
        print(f"{sum(kept)} of {len(kept)} students in {out} were continued or finished before\n")
    table = as_table(teacher, results)
    seconds = time.perf_counter() - started
    page = write_report(out, recipe, teacher, results, seconds)
    print(f"{table}\n\n{seconds:.0f} s in total; report: {page}\n")
    return compare_maps(out, teacher, results[0], quiet)


def compare_maps(out: Path, teacher: RunResult, student: RunResult, quiet: bool) -> int:
    """Diagnoses the teacher and a student on the validation images; returns the exit code."""
    config = DiagnoseConfig(
        teacher=str(teacher.folder / "last.pt"),
        student=str(student.folder / "last.pt"),
        data=str(out / "digits" / "val"),
        out=str(out / DIAGNOSTICS),
        device="cpu",
        workers=0,
        batch_size=36,
        resume="never",
    )
    try:
        findings = diagnose(config, quiet=quiet)
    except Interrupted as stop:
        print(f"featkd: {stop}", file=sys.stderr)
        return 128 + stop.signal
    print(*findings.conclusions(), sep="\n")
    print(f"{plural(findings.images, 'image')}: {out / DIAGNOSTICS / 'report.html'}")
    return 0


def keep_or_clear(recipe: Recipe, wanted: bool = True) -> bool:
    """Checks whether a run can be continued, and deletes its folder otherwise.

    Args:
        recipe: the run.
        wanted: if False, the folder is deleted in any case.
    """
    last = Path(recipe.out) / "last.pt"
    if wanted and last.exists():
        try:
            state = checkpoint.load(last)
        except checkpoint.CheckpointError:  # written by an older featkd
            state = {"recipe": None}
        same_recipe = state["recipe"] == to_dict(recipe)
        if same_recipe and state["versions"] == environment.versions():
            return True
    shutil.rmtree(recipe.out, ignore_errors=True)
    return False


def teacher_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Recipe of the demo's teacher: the teacher model, trained as a plain student."""
    assert recipe.teacher is not None
    options = dict(recipe.teacher.options)
    student = replace(recipe.student, base=recipe.teacher.name, arch="plain", options=options)
    loss = LossConfig(label_smoothing=recipe.loss.label_smoothing)
    return replace(recipe, out=str(folder), student=student, teacher=None, loss=loss)


def student_recipe(recipe: Recipe, name: str, seed: int, out: Path, teacher: RunResult) -> Recipe:
    """Recipe of one of `STUDENTS`, with a seed and the trained teacher."""
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


_stopped = False  # a signal has ended a run of this process


def train(name: str, recipe: Recipe) -> RunResult:
    """Runs one recipe in this process, from its checkpoint if there is one.

    Raises:
        KeyboardInterrupt: a signal ended this run, or an earlier one of this process. The pool
            hands out a few runs in advance, and they cannot be cancelled.
    """
    global _stopped
    if _stopped:
        raise KeyboardInterrupt
    trainer = Trainer(recipe, distributed.start("cpu"))
    outcome = trainer.run(quiet=True)
    if outcome.interrupted_by is not None:
        _stopped = True
        raise KeyboardInterrupt
    return RunResult(
        name=name,
        seed=recipe.seed,
        parameters=sum(p.numel() for p in trainer.components.student.parameters()),
        top1=outcome.scores["model"]["top1"],
        images_per_s=throughput(Path(recipe.out)),
        folder=Path(recipe.out),
    )


def train_all(
    jobs: dict[tuple[str, int], Recipe], description: str, quiet: bool = False
) -> list[RunResult]:
    """Runs recipes in parallel, one single-threaded process per core.

    The models are too small for a run to gain from a second core.

    Args:
        jobs: recipes by (name, seed).
        description: label of the progress bar.
        quiet: show no progress bar.

    Returns:
        The results in the order of the jobs.
    """
    cores = len(os.sched_getaffinity(0))
    server = multiprocessing.get_context("forkserver")  # imports the trainer only once
    server.set_forkserver_preload(["featkd.train.trainer"])
    _start_fork_server()
    results: dict[tuple[str, int], RunResult] = {}
    with ProcessPoolExecutor(min(cores, len(jobs)), server, initializer=_start_process) as pool:
        try:
            # A process whose start is interrupted would run on without the pool, and fail.
            with Interrupt() as interrupt:
                running = {pool.submit(train, key[0], recipe): key for key, recipe in jobs.items()}
            if interrupt.signal is not None:
                signal.raise_signal(interrupt.signal)
            done = as_completed(running)
            bar = tqdm(
                *(done, description, len(running)),
                unit="run",
                disable=quiet or None,  # None: no bar if stderr is no terminal
            )
            for future in bar:
                results[running[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # it saves its checkpoint, unless Ctrl-C has made it do so
            raise
    return [results[key] for key in jobs]


def _start_process() -> None:
    """Initializes a process of the pool, which would otherwise outlive a killed demo."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default is a semaphore that a killed process leaks
    end_with_parent()


def _start_fork_server() -> None:
    """Starts the fork server with SIGINT ignored, as are then its children outside of training.

    Ctrl-C reaches every process of the terminal. While one of them imports, waits or builds a model
    it would print a traceback; `train_all` ends them all.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread can set a handler
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
