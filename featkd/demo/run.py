"""Trains the demo's teacher and students with the trainer of `featkd distill`."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from featkd.compare.pool import train_all
from featkd.compare.report import as_table
from featkd.compare.results import RunResult
from featkd.demo.digits import write_digits
from featkd.demo.report import DIAGNOSTICS, STUDENTS, rows, write_report
from featkd.diagnostics import DiagnoseConfig, diagnose
from featkd.diagnostics.process_run import Interrupted
from featkd.runtime import environment
from featkd.runtime.names import plural
from featkd.train import checkpoint
from featkd.train.recipe import LossConfig, Recipe, TeacherConfig, to_dict
from featkd.train.recipe_file import find_recipe, load_recipe


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
    table = as_table(rows(teacher, results))
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
