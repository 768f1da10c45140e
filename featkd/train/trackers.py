"""Weights & Biases and MLflow, which receive the rows of a run's CSV files.

The CSV files are complete, a tracker may lack rows: a killed process loses what it has not sent. At
the start of a session a tracker is therefore given all rows of the CSV files, and passes over those
that it has. Updates that a resumed run repeats are not sent again either.

Neither uses the network unless the environment asks for it.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featkd.runtime.distributed import ProcessContext
from featkd.runtime.files import atomic_write
from featkd.runtime.remote import Location
from featkd.train.recipe import Recipe, to_dict

FILE = "trackers.json"


class TrackerError(RuntimeError):
    """A tracker can't be started."""


class WandbRun:
    """A run of Weights & Biases.

    An offline run is a folder that `wandb sync` uploads. A resumed run gets a new one that holds
    all rows, so the earlier ones are removed.

    A server takes the points of an update once, and none of an earlier one. All points of an update
    are therefore sent together, when the next update or the end of the whole run follows: a resumed
    run may repeat the evaluation after the last update.

    Attributes:
        name: the tracker, as in the recipe.
        description: the run and its place, for the user.
        identity: values by which a resumed run finds it.
    """

    name = "wandb"

    def __init__(self, saved: Mapping[str, str], folder: Location, recipe: dict[str, Any]) -> None:
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._offline = offline = mode in ("offline", "dryrun", "disabled")
        if offline:  # error reports are sent in these modes too
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        own_folder = isinstance(folder, Path) and "WANDB_DIR" not in os.environ
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "featkd",
            name=os.environ.get("WANDB_NAME") or recipe["out"][-128:],  # its limit
            id=saved.get("run"),
            dir=str(folder) if own_folder else None,
            config=recipe,
            allow_val_change=True,
            mode=mode,
            resume="allow" if saved and not offline else None,
            reinit="create_new",  # a script that calls the trainer may have a run of its own
            settings=wandb.Settings(console="off", quiet=True, silent=offline),
        )
        self._first = self._run.step  # the server has the steps before
        self._update, self._points = 0, dict[str, float]()  # not sent yet
        self.identity = {"run": self._run.id}
        place = Path(self._run.dir).parent.absolute()
        for earlier in place.parent.glob(f"offline-run-*-{glob.escape(self._run.id)}"):
            if earlier.absolute() != place:
                shutil.rmtree(earlier, ignore_errors=True)
        where = f"{place}; `wandb sync` uploads it" if offline else str(self._run.url)
        disabled = mode == "disabled"
        self.description = f"WANDB_MODE={mode}" if disabled else f"run {self._run.id} in {where}"

    def log(self, points: Mapping[str, float], update: int) -> None:
        """Sends the points of curves at an update, unless the tracker has them."""
        if update != self._update:
            self._send()
        if update >= self._first:
            self._update = update
            self._points |= points

    def _send(self) -> None:
        if self._points:
            self._run.log(self._points, step=self._update)
            self._points = {}

    def close(self, *, complete: bool) -> None:
        """Ends the session; `complete` if the run has reached its last epoch."""
        try:
            if complete or self._offline:
                self._send()
        finally:
            self._run.finish(exit_code=0 if complete else 1)


class MlflowRun:
    """A run of MLflow, with the interface of `WandbRun`.

    It lies in MLflow's default store unless MLFLOW_TRACKING_URI is set.
    """

    name = "mlflow"

    def __init__(self, saved: Mapping[str, str], folder: Location, recipe: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        # A store of the environment is not saved: it may be a server, and hold a password.
        asked = os.environ.get("MLFLOW_TRACKING_URI")
        self._client, self._metric = MlflowClient(asked or saved.get("store")), Metric
        self._error = MlflowException
        self._store = without_password(self._client.tracking_uri)
        params = {key: text[:6000] for key, text in flattened(recipe).items()}  # MLflow's limit
        self._last: dict[str, int] = {}  # the last step of each metric
        if saved:
            self._id = saved["run"]
            self._reopen(folder, params)
        else:
            run = self._client.create_run(self._experiment(), run_name=recipe["out"])
            self._id = run.info.run_id
            rows = [Param(*pair) for pair in params.items()]
            for first in range(0, len(rows), 100):  # the limit of a request
                self._client.log_batch(self._id, params=rows[first : first + 100])
        self.identity = {"run": self._id}
        if not asked:
            self.identity["store"] = self._client.tracking_uri
        self.description = f"run {self._id} in {self._store}"

    def _experiment(self) -> str:
        """Returns the id of the experiment, which is created if it is missing."""
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "featkd"
        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name))
            except self._error:
                # Another process may just have created it.
                if (found := self._client.get_experiment_by_name(name)) is None:
                    raise
        return str(found.experiment_id)

    def _reopen(self, folder: Location, params: Mapping[str, str]) -> None:
        """Continues a run; parameters can't be changed, so changed ones become tags."""
        try:
            data = self._client.get_run(self._id).data
        except self._error as error:
            raise TrackerError(
                f"{self._store} has no run {self._id}, which {folder / FILE} names; "
                "set MLFLOW_TRACKING_URI to its store, or delete that file to send the whole run "
                f"to a new one ({error})"
            ) from error
        self._client.update_run(self._id, status="RUNNING")
        for key, text in params.items():
            if data.params.get(key) != text:
                self._client.set_tag(self._id, f"resumed.{key}", text)
        for key in data.metrics:
            history = self._client.get_metric_history(self._id, key)
            self._last[key] = max(point.step for point in history)

    def log(self, points: Mapping[str, float], update: int) -> None:
        now = int(time.time() * 1000)
        rows = [
            self._metric(key, value, now, update)
            for key, value in points.items()
            if update > self._last.get(key, -1)
        ]
        if rows:
            self._client.log_batch(self._id, metrics=rows)

    def close(self, *, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


Tracker = WandbRun | MlflowRun
_KINDS: Mapping[str, Callable[..., Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun}


def check_installed(names: Sequence[str]) -> None:
    """Checks that the packages of trackers are installed.

    Raises:
        ImportError: one is missing; names the extra of featkd that has it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"log.trackers: {name} is not installed: pip install '/path/to/featkd[{name}]'"
            )


def open_trackers(
    recipe: Recipe, folder: Location, context: ProcessContext, *, resumed: bool
) -> list[Tracker]:
    """Starts the runs of a recipe's trackers; a collective.

    Args:
        recipe: the recipe.
        folder: the run's folder; `trackers.json` in it names the runs.
        context: this process.
        resumed: the run continues from the last checkpoint in `folder`, so its runs are continued.

    Returns:
        The runs on process 0; none on the others.

    Raises:
        TrackerError: a tracker can't be started, or `trackers.json` can't be read.
    """
    found: list[Tracker] = []

    def start() -> None:
        saved = _read(folder / FILE) if resumed else {}
        for name in recipe.log.trackers:
            try:
                found.append(_KINDS[name](saved.get(name, {}), folder, to_dict(recipe)))
            except Exception as error:
                for tracker in found:
                    tracker.close(complete=False)
                raise TrackerError(
                    f"log.trackers: {name} can't be started: {one_line(error)}"
                ) from error
            saved[name] = found[-1].identity
        with atomic_write(folder / FILE) as file:
            file.write(json.dumps(saved, indent=2).encode() + b"\n")

    if recipe.log.trackers:
        context.on_main(start)
    return found


def _read(path: Location) -> dict[str, dict[str, str]]:
    """Reads `trackers.json`; empty if it is missing."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        return {name: {**entry, "run": str(entry["run"])} for name, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrackerError(
            f"log.trackers: {path} can't be read: {one_line(error)}; delete it to send the whole "
            "run to new runs of the trackers"
        ) from error


def flattened(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Maps the dotted names of a recipe's fields to their values as text."""
    fields: dict[str, str] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            fields |= flattened(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return fields


def without_password(url: str) -> str:
    """Returns a URL without its user and password.

    Examples:
        >>> without_password("postgresql://me:secret@host/runs")
        'postgresql://host/runs'
    """
    return re.sub("//[^/@]*@", "//", url)


def one_line(error: Exception) -> str:
    """Text of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
