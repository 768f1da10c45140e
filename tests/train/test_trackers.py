"""Trackers: real runs of wandb (offline) and mlflow (SQLite), and the trainer's side of them."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sqlite3
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featkd.cli.main import main
from featkd.runtime.distributed import ProcessContext
from featkd.train import components, trackers
from featkd.train.logs import EVAL_COLUMNS, TRAIN_COLUMNS, read_csv
from featkd.train.recipe import LogConfig, Recipe, RecipeError, to_dict
from featkd.train.trackers import MlflowRun, TrackerError, WandbRun
from featkd.train.trainer import Trainer
from tests.test_ranks import wait_for
from tests.train.runs import CPU, changed, full_disk, interrupt, run

MISSING = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None]
# An update that a resumed run repeats keeps its first value, and its speed differs.
SPEED = "train/images_per_s"


def points(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves of a run, from its CSV files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file, columns in (("metrics", TRAIN_COLUMNS[1:]), ("eval", EVAL_COLUMNS[3:])):
        for row in read_csv(out / f"{file}.csv"):
            prefix = f"eval/{row['weights']}" if file == "eval" else "train"
            for name in columns:
                if name != "images" and row[name]:
                    point = int(row["update"]), float(row[name])
                    found.setdefault(f"{prefix}/{name}", []).append(point)
    return found


def check_same(curves: dict[str, list[tuple[int, float]]], out: Path) -> None:
    """Checks that curves are those of the CSV files, each update once and in order."""
    expected = points(out)
    assert curves.keys() == expected.keys()
    for name, curve in curves.items():
        if name == SPEED:
            assert [step for step, _ in curve] == [step for step, _ in expected[name]]
        else:
            assert curve == expected[name], name


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_a_killed_and_resumed_run_is_one_run(recipe_file, server, tmp_path):
    """Both trackers at once; nothing may connect to a server."""
    out, store = tmp_path / "run", tmp_path / "mlflow.db"
    with socket.create_server(("127.0.0.1", 0)) as trap:
        proxy = f"http://127.0.0.1:{trap.getsockname()[1]}"
        env = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
        env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{store}", "NO_PROXY": "", "no_proxy": ""}
        words = ("distill", recipe_file, "--out", out, "--log.trackers", "[wandb, mlflow]")
        words = (*words, "--optim.epochs", 6, "--checkpoint.every_updates", 4)
        first = server.start(*words, env=env)
        wait_for(lambda: len(read_csv(out / "metrics.csv")) >= 10, [first], 300)
        first.kill()
        first.wait()
        assert (out / "last.pt").exists()
        second = server.start(*words, "--batch_size", 8, "--data.workers", 1, env=env)
        assert second.wait(300) == 0, second.stderr
        assert "resumed from" in second.stderr
        trap.settimeout(0)
        with pytest.raises(BlockingIOError):
            trap.accept()
    assert len(read_csv(out / "metrics.csv")) == 36
    ids = json.loads((out / "trackers.json").read_text())

    with sqlite3.connect(store) as database:
        ((run_id, status),) = database.execute("SELECT run_uuid, status FROM runs").fetchall()
        rows = database.execute("SELECT key, step, value FROM metrics ORDER BY step").fetchall()
        params = dict(database.execute("SELECT key, value FROM params").fetchall())
        tags = dict(database.execute("SELECT key, value FROM tags").fetchall())
    assert (run_id, status) == (ids["mlflow"]["run"], "FINISHED")
    assert params["student.options.embed_dim"] == "12"
    assert (params["data.workers"], tags["resumed.data.workers"]) == ("0", "1")
    curves: dict[str, list[tuple[int, float]]] = {}
    for key, step, value in rows:
        curves.setdefault(key, []).append((step, value))
    check_same(curves, out)

    (folder,) = (out / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    assert file.name == f"run-{ids['wandb']['run']}.wandb"
    dump = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    records = [json.loads(line) for line in dump.stdout.splitlines()]
    (config,) = [x["run"]["config"]["update"] for x in records if x["type"] == "run"]
    assert config["student"]["options"]["embed_dim"] == 12
    assert config["data"]["workers"] == 1
    steps, curves = [], {}
    for record in records:
        if record["type"] == "history":
            steps.append(record["history"]["step"]["num"])
            for key, value in record["history"]["item"].items():
                if not key.startswith("_"):
                    curves.setdefault(key, []).append((steps[-1], value))
    assert steps == [*range(1, 37)]
    check_same(curves, out)


class Kept:
    """A tracker in memory; fails at the updates of `broken`."""

    name = "kept"
    description = "in memory"
    broken: frozenset[int] = frozenset()
    saved: list[dict[str, str]]
    closed: list[bool]
    points: dict[str, dict[int, float]]

    def __init__(self, saved: dict[str, str], folder: Any, recipe: dict[str, Any]) -> None:
        self.identity = {"run": saved.get("run", str(len(self.saved)))}
        self.saved.append(saved)

    def log(self, points: dict[str, float], update: int) -> None:
        if update in self.broken:
            raise RuntimeError("no\nserver")
        for name, value in points.items():
            self.points.setdefault(name, {}).setdefault(update, value)

    def close(self, *, complete: bool) -> None:
        self.closed.append(complete)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces wandb by a tracker in memory."""
    kind = type("Kept", (Kept,), {"saved": [], "closed": [], "points": {}})
    monkeypatch.setattr(trackers, "_KINDS", {"wandb": kind})
    monkeypatch.setattr(components, "check_installed", lambda names: None)
    return kind


@pytest.fixture
def tracked(alone: Recipe) -> Recipe:
    return replace(alone, log=LogConfig(["wandb"]))


def curves_of(kept: Any) -> dict[str, list[tuple[int, float]]]:
    return {name: sorted(curve.items()) for name, curve in kept.points.items()}


def test_a_tracker_that_fails_is_named_and_gets_the_rows_later(tracked, kept, capsys):
    kept.broken = frozenset({4})
    outcome = run(tracked)
    assert outcome.updates == 12
    out = Path(tracked.out)
    assert len(read_csv(out / "metrics.csv")) == 12
    assert [*kept.points["train/loss"]] == [1, 2, 3]
    error = capsys.readouterr().err
    assert "kept: gets no rows from update 4 on: no server; the run goes on" in error
    assert error.count("no server") == 1
    assert json.loads((out / "trackers.json").read_text()) == {"wandb": {"run": "0"}}
    kept.broken = frozenset()
    run(tracked)  # nothing is left to train
    check_same(curves_of(kept), out)
    assert kept.saved == [{}, {"run": "0"}]
    assert kept.closed == [False, True]


def test_a_tracker_added_later_gets_the_whole_run(alone, tracked, kept):
    run(changed(alone, optim=dict(epochs=1, warmup_epochs=0)))
    longer = changed(tracked, optim=dict(warmup_epochs=0))
    run(longer)
    assert len(kept.points["train/loss"]) == 12
    check_same(curves_of(kept), Path(alone.out))
    run(changed(longer, optim=dict(epochs=3)), f"{alone.out}/last.pt")
    assert kept.saved == [{}, {"run": "0"}]


def test_another_checkpoint_begins_another_run(tracked, kept, tmp_path):
    run(tracked)
    run(replace(tracked, out=str(tmp_path / "more")), f"{tracked.out}/last.pt")
    assert kept.saved == [{}, {}]
    assert json.loads((tmp_path / "more" / "trackers.json").read_text())["wandb"]["run"] == "1"


def test_a_checkpoint_spelled_in_another_way_goes_on_with_the_run(
    tracked, kept, tmp_path, monkeypatch
):
    run(tracked)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder, last in (("", "./run/last.pt"), ("run", "last.pt"), ("run", "../link/last.pt")):
        monkeypatch.chdir(tmp_path / folder)
        run(tracked, last)
    assert kept.saved == [{}] + 3 * [{"run": "0"}]
    url = replace(tracked, out="memory://tracked/run")
    run(url)
    run(url, "memory:///tracked/run/last.pt")
    assert kept.saved[4:] == [{}, {"run": "4"}]


def test_only_the_first_process_has_trackers(tracked, kept, tmp_path):
    second = ProcessContext(1, 1, torch.device("cpu"))
    assert trackers.open_trackers(tracked, tmp_path, second, resumed=False) == []
    assert kept.saved == []
    assert not (tmp_path / trackers.FILE).exists()


def test_a_run_that_ends_early_is_not_complete(tracked, kept):
    interrupt(Trainer(tracked, CPU), 3)
    assert kept.closed == [False]


def test_a_missing_package_is_named_at_the_start(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for words in ([], ["--dry-run"]):
        assert main(["distill", str(recipe_file), "--log.trackers", "[wandb]", *words]) == 1
        said = capsys.readouterr()
        assert said.err == (
            "featkd: log.trackers: wandb is not installed: pip install '/path/to/featkd[wandb]'\n"
        )
    assert not (tmp_path / "run").exists()


def test_trackers_that_cannot_be_started(tracked, kept, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError("no\nkey")

    run(tracked)
    for text in ("{", "[]", '{"wandb": {}}'):
        (Path(tracked.out) / "trackers.json").write_text(text)
        with pytest.raises(TrackerError, match=r"trackers.json can't be read: .*; delete it"):
            run(tracked)
    (Path(tracked.out) / "trackers.json").unlink()
    monkeypatch.setattr(kept, "__init__", fail)
    with pytest.raises(TrackerError, match=r"log\.trackers: wandb can't be started: no key$"):
        run(tracked)
    for names in (["tensorboard"], ["wandb", "wandb"]):
        with pytest.raises(RecipeError, match=r"log\.trackers: expected wandb, mlflow or both"):
            LogConfig(names)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["online", "offline", None])
def test_wandb_is_online_if_the_environment_says_so(recipe, tmp_path, monkeypatch, mode):
    """Online, the server has the steps of earlier sessions, and its run is resumed.

    It takes each step once, so the last one of a run that is not complete is sent when that goes
    on: with the evaluation that is then repeated.
    """
    sent: list[Any] = []
    made = types.SimpleNamespace(
        id="abc", step=5 if mode == "online" else 0, dir=str(tmp_path / "wandb/now/files"),
        url="https://server/abc", log=lambda points, step: sent.append((step, points)),
        finish=lambda exit_code: sent.append(exit_code),
    )  # fmt: skip
    options: dict[str, Any] = {}

    def init(**given: Any) -> Any:
        options.update(given)
        return made

    module = types.SimpleNamespace(init=init, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    earlier = tmp_path / "wandb/offline-run-20260101_000000-abc"
    other = tmp_path / "wandb/offline-run-20260101_000000-xyz"
    for folder in (earlier, other):
        folder.mkdir(parents=True)
    online = mode == "online"
    for complete in (False, True):
        tracker = WandbRun({"run": "abc"}, tmp_path, to_dict(recipe))
        for name, update in (("a", 4), ("a", 5), ("a", 6), ("b", 6)):
            tracker.log({name: 1.0}, update)
        tracker.close(complete=complete)
        expected = [(4, {"a": 1.0}), (5, {"a": 1.0}), (6, {"a": 1.0, "b": 1.0})]
        assert sent == [*expected[online : 3 if complete or not online else 2], int(not complete)]
        sent.clear()
    tracker = WandbRun({"run": "abc"}, tmp_path, to_dict(recipe))
    tracker.log({"a": 1.0}, 7)
    made.log = full_disk
    with pytest.raises(OSError, match="No space left"):
        tracker.close(complete=True)
    assert sent == [0]  # the run is ended all the same
    assert options["mode"] == (mode or "offline")
    assert options["resume"] == ("allow" if online else None)
    assert (options["id"], options["dir"]) == ("abc", str(tmp_path))
    assert ("https://server/abc" in tracker.description) == online
    assert (earlier.exists(), other.exists()) == (False, True)
    assert ("WANDB_ERROR_REPORTING" in os.environ) != online


def test_an_mlflow_run_that_its_store_does_not_have(recipe, tmp_path, monkeypatch):
    class MlflowException(Exception):
        pass

    def get_run(run_id: str) -> Any:
        raise MlflowException(f"Run with id={run_id} not found")

    def client(store: str) -> Any:
        return types.SimpleNamespace(tracking_uri=store, get_run=get_run)

    for name, content in {
        "mlflow": {"MlflowClient": client},
        "mlflow.entities": {"Metric": None, "Param": None},
        "mlflow.exceptions": {"MlflowException": MlflowException},
    }.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for uri, expected in ((None, "sqlite:///mine.db"), ("http://server", "http://server")):
        if uri is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(TrackerError, match=f"^{expected} has no run 7, which .*trackers.json"):
            MlflowRun({"run": "7", "store": "sqlite:///mine.db"}, tmp_path, to_dict(recipe))
