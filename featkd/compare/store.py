"""State of a comparison in `OUT/results.json`: finished runs, and decisions that they share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from featkd.compare.analysis import Analysis
from featkd.compare.mismatch import MapFigures, TeacherMap
from featkd.compare.results import RunResult
from featkd.runtime import environment
from featkd.runtime.files import atomic_write
from featkd.runtime.names import listed
from featkd.train.checkpoint import CheckpointError
from featkd.train.recipe import Recipe, RecipeError, to_dict
from featkd.train.recipe_changes import changed_fields

_FORMAT = 1


class Store:
    """Reads and writes the state of a comparison.

    Args:
        out: folder of the comparison, which is locked.
        recipe: the recipe that is compared.

    Attributes:
        runs: finished runs by (arm, seed).
        width: width of the plain_wide arm; None until it is known.
        teacher: "cached" or the reason to run the teacher; None until it is decided.
        teacher_map: figures of the teacher's map, or the reason why they can't be measured; None
            until then.

    Raises:
        CheckpointError: the folder holds something else, or the file can't be read.
        RecipeError: the folder holds a comparison of another recipe.
    """

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self._path, self._recipe = out / "results.json", recipe
        self.runs: dict[tuple[str, int], RunResult] = {}
        self.width: int | None = None
        self.teacher: str | None = None
        self.teacher_map: TeacherMap | str | None = None
        if not self._path.exists():
            if others := sorted(x.name for x in out.iterdir() if not x.name.startswith(".")):
                raise CheckpointError(
                    f"out: {out} holds {listed(others, 5)}; expected a comparison or an empty "
                    "folder"
                )
            self.save()
            return
        try:
            state = json.loads(self._path.read_text())
            if state["format"] != _FORMAT:
                raise ValueError(f"format {state['format']}, expected {_FORMAT}")
            self.width, self.teacher = state["plain_wide_width"], state["teacher"]
            self.teacher_map = _teacher_map(state.get("teacher_map"))
            for run in state["runs"]:
                if "map" not in run:  # written before maps were measured: the run is opened again
                    continue
                own = {"folder": out / run["folder"], "map": _figures(run["map"])}
                self.runs[run["name"], run["seed"]] = RunResult(**{**run, **own})
            changes = changed_fields(state["recipe"], recipe)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._path}: not a comparison's results: {error}") from error
        versions, now = state["versions"], environment.versions()
        changes += [
            f"versions.{name}: {versions.get(name)} -> {now.get(name)}"
            for name in {**versions, **now}
            if versions.get(name) != now.get(name)
        ]
        if changes:
            raise RecipeError(
                f"{self._path}: belongs to another comparison: {listed(changes, 5, '; ')}; "
                "expected the recipe and versions that it was started with, or another --out"
            )

    def add(self, result: RunResult) -> None:
        """Records a finished run."""
        self.runs[result.name, result.seed] = result
        self.save()

    def save(self, found: Analysis | None = None) -> None:
        """Writes the file; of a finished comparison, also what it found."""
        state: dict[str, Any] = {
            "format": _FORMAT,
            "finished": found is not None,
            **vars(found or Analysis("", [], [])),
            "teacher": self.teacher,
            "teacher_map": self.teacher_map,
            "plain_wide_width": self.width,
            "runs": [
                {**vars(run), "folder": run.folder.name} for _, run in sorted(self.runs.items())
            ],
            "recipe": to_dict(self._recipe),
            "versions": environment.versions(),
        }
        with atomic_write(self._path) as file:
            file.write((json.dumps(state, indent=2, default=vars) + "\n").encode())


def _figures(stored: Any) -> MapFigures | str | None:
    return MapFigures(**stored) if isinstance(stored, dict) else stored


def _teacher_map(stored: Any) -> TeacherMap | str | None:
    if not isinstance(stored, dict):
        return cast(str | None, stored)
    return TeacherMap(
        MapFigures(**stored["figures"]), tuple(stored["reach"]), int(stored["images"])
    )
