"""Trains the demo's teacher and compares students of two widths with it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from featkd.compare import compare
from featkd.compare.pool import train_all
from featkd.compare.report import write_page
from featkd.demo.digits import write_digits
from featkd.runtime.names import plural
from featkd.train.checkpoint import load
from featkd.train.recipe import Recipe
from featkd.train.recipe_file import find_recipe, load_recipe

# recipe -> arms
CASES = {
    "demo": "ce,plain,lift,widelast",
    "demo_mismatch": "ce,plain,lift,widelast,plain_wide",
}
_SEARCHED = (
    "This case was searched for, on the training images and with the trained teacher alone, before "
    "any of its students was trained: its student has the largest multiple of four channels at "
    "which the reach is below 90 %. docs/compare.md describes the search."
)


def run_demo(out: Path, seeds: int = 3, epochs: int | None = None, *, quiet: bool = False) -> None:
    """Compares students with and without a mismatch to their teacher, on real digits.

    Prints both comparisons and writes `out/report.html`. Finished runs in `out` are kept, and
    interrupted ones continue.

    Args:
        out: folder for the images, the runs and the report.
        seeds: seeds per arm.
        epochs: epochs per run; None uses the recipes'.
        quiet: show no progress bars.

    Raises:
        ValueError: `seeds` is below 1, or the folder holds a demo of other epochs or versions.
        ImportError: scikit-learn is not installed.
        CheckpointError: another process writes to the folder, or it holds something else.
    """
    if seeds < 1:  # before the teacher trains
        raise ValueError(f"seeds: expected a whole number >= 1, got {seeds}")
    started = time.perf_counter()
    teacher = _recipe("demo_teacher", out, epochs)
    _check_epochs(Path(teacher.out) / "last.pt", teacher.optim.epochs)
    write_digits(out / "digits")
    (trained,) = train_all({("teacher", teacher.seed): teacher}, "training the teacher", quiet)
    cases = {}
    for name, arms in CASES.items():
        recipe = _recipe(name, out, epochs)
        assert recipe.teacher is not None
        weights = str(Path(teacher.out) / "last.pt")
        recipe = replace(recipe, teacher=replace(recipe.teacher, checkpoint=weights))
        width = recipe.student.options["embed_dim"]
        print(f"student of {width} channels\n")
        searched = name == "demo_mismatch" and epochs is None  # other teachers have another reach
        about = _SEARCHED if searched else ""
        cases[f"A student of {width} channels"] = about, compare(recipe, arms, seeds, quiet=quiet)
        print()
    intro = (
        f"A teacher ({trained.top1:.2f} % top-1) and students of two widths, "
        f"{plural(seeds, 'seed')} per arm, trained on 1,437 and validated on 360 of scikit-learn's "
        "8 x 8 digits; one image is 0.28 points. Images this small show how diagnosis and training "
        "fit together. They do not rank the methods."
    )
    page, seconds = out / "report.html", time.perf_counter() - started
    write_page(page, "featkd demo", intro, cases)
    print(f"{seconds:.0f} s in total; report: {page}")


def _check_epochs(path: Path, epochs: int) -> None:
    """Refuses a folder whose teacher has another number of epochs, before it is trained on."""
    if path.is_file():
        found = load(path)["recipe"]["optim"]["epochs"]
        if found != epochs:
            raise ValueError(
                f"epochs: {path.parent.parent} holds a demo whose teacher trains for "
                f"{plural(found, 'epoch')}, not {epochs}; use the same number, or another --out"
            )


def _recipe(name: str, out: Path, epochs: int | None) -> Recipe:
    """Recipe with the demo's folders and number of epochs."""
    recipe = load_recipe(find_recipe(name))
    data, optim = replace(recipe.data, path=str(out / "digits")), recipe.optim
    if epochs is not None:
        warmup = min(optim.warmup_epochs, epochs - 1)
        optim = replace(optim, epochs=epochs, warmup_epochs=warmup)
    return replace(recipe, out=str(out / Path(recipe.out).name), data=data, optim=optim)
