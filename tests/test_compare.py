"""A comparison: its arms, intervals, sentences, and a whole one that is killed and resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from scipy import stats

from featkd.cli import compare as command
from featkd.cli.main import main
from featkd.compare import compare, mismatch
from featkd.compare.analysis import analyse
from featkd.compare.arms import ARMS, arm_recipe, choose_arms, wide_width
from featkd.compare.mismatch import MapFigures, TeacherMap
from featkd.compare.pool import devices, train
from featkd.compare.results import RunResult
from featkd.compare.statistics import interval
from featkd.diagnostics import DiagnoseConfig, LayerDiagnostics, diagnose
from featkd.models import create_student
from featkd.runtime.distributed import start
from featkd.train.components import build
from featkd.train.logs import read_csv
from featkd.train.recipe import LossConfig, Recipe, to_yaml
from featkd.train.recipe_file import find_recipe, load_recipe
from tests.conftest import TINY
from tests.forking import Server
from tests.page import read_page
from tests.test_demo import InProcessPool
from tests.train.runs import same_weights


@pytest.fixture
def short(recipe: Recipe) -> Recipe:
    """`recipe` with one epoch, to be quick."""
    return replace(recipe, optim=replace(recipe.optim, epochs=1, warmup_epochs=0))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 10, 11, 31, 100])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_intervals_equal_scipys(count: int, level: float):
    values = [(7 * number % 10) / 10 for number in range(count)]
    low, high = stats.t.interval(level, count - 1, stats.tmean(values), stats.sem(values))
    found = interval(values, level)
    expected = stats.tmean(values), low, high
    assert (found.mean, found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert interval(values[:1]).low is None


def test_arms_differ_in_student_and_loss_alone(recipe: Recipe, tmp_path: Path):
    base = replace(recipe, loss=replace(recipe.loss, projector="linear"))
    found = {}
    for name in ARMS:
        run = arm_recipe(base, name, 5, tmp_path, 24)
        own = {"student": base.student, "teacher": base.teacher, "loss": base.loss}
        assert replace(run, **own) == replace(base, seed=5, out=str(tmp_path / f"{name}-seed5"))
        student, loss = run.student, run.loss
        assert loss.label_smoothing == base.loss.label_smoothing
        facts = loss.alpha, loss.feature, loss.projector
        width, teacher = student.options["embed_dim"], run.teacher is not None
        found[name] = student.arch, width, teacher, *facts
    assert found == {
        "ce": ("plain", 12, False, 0.0, None, "none"),
        "soft_kd": ("plain", 12, True, 0.5, None, "none"),
        "plain": ("plain", 12, True, 0.5, "spectral", "none"),
        "plain_projector": ("plain", 12, True, 0.5, "spectral", "linear_norm"),
        "lift": ("lift", 12, True, 0.5, "spectral", "linear"),
        "widelast": ("widelast", 12, True, 0.5, "spectral", "linear"),
        "plain_wide": ("plain", 24, True, 0.5, "spectral", "none"),
    }
    assert base.student.options == TINY | {"drop_path_rate": 0.2}


def test_the_wide_arm_has_about_the_parameters_of_widelast(recipe: Recipe):
    options = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    recipe = replace(recipe, student=replace(recipe.student, teacher_dim=64, options=options))

    def parameters(arch: str, width: int) -> int:
        own = {**options, "img_size": 16, "embed_dim": width}
        model = create_student("vit_tiny_patch16_224", arch, 64, 3, **own)
        return sum(p.numel() for p in model.parameters())

    wanted = parameters("widelast", 32)
    nearest = min(range(40, 72, 8), key=lambda width: abs(parameters("plain", width) - wanted))
    assert wide_width(recipe, 3) == nearest


@pytest.mark.parametrize(
    ("changes", "arms", "message"),
    [
        ({}, "plain,wide", "arms: expected some of ce, soft_kd, .*, got 'wide'"),
        ({}, "plain,lift,lift", "arms: lift is given twice"),
        ({}, "ce,lift", "arms: expected plain among them"),
        ({"loss": LossConfig(feature="mse")}, "plain,soft_kd", "soft_kd .*: loss.alpha is 0"),
        ({"loss": LossConfig(alpha=0.5)}, None, "loss.feature: null, but"),
        ({"teacher": None, "loss": LossConfig()}, None, "teacher: null; expected"),
        ({"cache": "c"}, None, "cache: 'c', but compare makes a cache"),
    ],
)
def test_impossible_arms_are_refused(recipe: Recipe, changes, arms, message):
    with pytest.raises(ValueError, match=message):
        choose_arms(replace(recipe, **changes), arms)


def test_arms_that_a_recipe_has_no_terms_for_are_left_out_with_a_note(recipe: Recipe):
    assert choose_arms(recipe, None) == (list(ARMS), [])
    changed = replace(recipe, loss=LossConfig(feature="mse"))
    names, notes = choose_arms(changed, None)
    assert names == [name for name in ARMS if name != "soft_kd"]
    assert notes == ["arm soft_kd is left out: loss.alpha is 0"]


PLAIN = MapFigures(32, 32, 5, 13, 0.5, 0.1, 0.4, 0.5)


def results(tmp_path: Path, **top1: list[float]) -> list[RunResult]:
    sizes = {"plain": 1000, "lift": 1010, "widelast": 1500, "plain_wide": 1510}
    return [
        RunResult(name, seed, sizes[name], 0.5, value, 10.0, tmp_path, PLAIN)
        for name, values in top1.items()
        for seed, value in enumerate(values)
    ]


def test_differences_are_paired_by_seed(tmp_path: Path):
    plain, lift, wide = [70.0, 75.0, 80.0], [71.0, 76.1, 80.9], [71.0, 72.0, 84.0]
    runs = results(tmp_path, plain=plain, lift=lift, widelast=wide)
    found = analyse(["plain", "lift", "widelast"], runs[::-1], None)
    assert found.arms[0].difference is None
    difference = found.arms[1].difference
    paired = stats.ttest_rel(lift, plain).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((paired.low, paired.high))
    first, second = found.conclusions
    assert first == (
        "lift is 1.00 points above plain (95 % interval +0.75 to +1.25, 3 paired seeds): the "
        "interval excludes 0, so the choice of seed alone does not explain it."
    )
    assert "contains 0, so these seeds do not tell the two apart" in second


def test_sentences_name_one_seed_unequal_parameters_and_the_control(tmp_path: Path):
    one = analyse(["plain", "lift"], results(tmp_path, plain=[70.0], lift=[69.0]), None)
    assert one.conclusions == [
        "lift is 1.00 points below plain with one seed, which gives no interval: nothing can be "
        "concluded."
    ]
    runs = results(tmp_path, plain=[70, 71], widelast=[75, 76], plain_wide=[75.5, 74.5])
    found = analyse(["plain", "widelast", "plain_wide"], runs, None)
    assert found.conclusions[0].endswith("the student's 1.50 times as many parameters may.")
    assert found.conclusions[2].startswith("widelast is 0.50 points above plain_wide (95 %")


NONE = (
    "No mismatch here: one linear projector for all images, from the student's 32 channels, "
    "reaches 99.8 % of the energy of the teacher's 64, so there is nothing to mend"
)
SOME = NONE.replace("No", "A").replace("99.8", "85.0").replace("nothing", "something")
SAME = "no remedy is ahead of plain (lift -0.95 points)"
AHEAD = "lift is ahead of plain by +5.00 points"
LARGE = "widelast is ahead of plain by +5.00 points with 1.5 times as many parameters"
BEHIND = "not ahead: lift -0.95 points"
SIZE = "but not of plain_wide, which has about as many: its size may explain it"
TOO = ", and also of plain_wide, which has about as many"
PLAIN_TOPS, BETTER, WORSE = [70.0, 71.0], [75.0, 76.0], [69.0, 70.1]


@pytest.mark.parametrize(
    ("reach", "tops", "expected"),
    [
        (0.998, {"lift": WORSE}, f"{NONE}; and indeed {SAME}."),
        (0.998, {"lift": BETTER}, f"{NONE}; and yet {AHEAD}."),
        (0.998, {"lift": [75]}, f"{NONE}; one seed per arm does not show if a remedy is ahead."),
        (0.998, {"plain_wide": BETTER}, f"{NONE}."),
        (0.85, {"lift": BETTER}, f"{SOME}; and indeed {AHEAD}."),
        (0.85, {"lift": WORSE}, f"{SOME}; and yet {SAME}."),
        (0.85, {"lift": WORSE, "widelast": BETTER}, f"{SOME}; and indeed {LARGE}; {BEHIND}."),
        (0.85, {"widelast": BETTER, "plain_wide": [75.5, 75.5]}, f"{SOME}; and {LARGE}, {SIZE}."),
        (0.85, {"widelast": BETTER, "plain_wide": PLAIN_TOPS}, f"{SOME}; and indeed {LARGE}{TOO}."),
        (None, {"lift": BETTER}, f"The mismatch could not be measured; and {AHEAD}."),
    ],
)
def test_the_finding_follows_from_reach_and_differences(reach, tops, expected, tmp_path: Path):
    seeds = len(next(iter(tops.values())))
    runs = results(tmp_path, plain=PLAIN_TOPS[:seeds], **tops)
    teacher = None
    if reach is not None:
        teacher = TeacherMap(replace(PLAIN, channels=64), (*[reach] * 63, 1.0), 9)
    assert analyse(["plain", *tops], runs, teacher).finding == expected


def test_each_gpu_or_core_trains_a_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    for available, auto in ((True, ["cuda:0", "cuda:1"]), (False, ["cpu"] * 3)):
        monkeypatch.setattr("torch.cuda.is_available", Mock(return_value=available))
        assert devices("auto") == auto
    assert devices("cuda:1") == ["cuda:1"]
    assert devices("cpu") == ["cpu"] * 3


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr("featkd.compare.pool.ProcessPoolExecutor", InProcessPool)
    monkeypatch.setattr("featkd.compare.pool._start_fork_server", lambda: None)


_IN_A_THREAD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from featkd.compare import pool

pool.ProcessPoolExecutor = lambda *_: ThreadPoolExecutor(1)  # starts at once
pool._start_fork_server = lambda: None
from featkd.cli.main import main
sys.exit(main())
"""


def stored(out: Path | str) -> dict[str, Any]:
    """The content of results.json."""
    return json.loads((Path(out) / "results.json").read_text())


def table(out: Path) -> dict[str, Any]:
    """Everything in results.json that does not depend on time."""
    state = stored(out)
    assert state.pop("finished")
    del state["recipe"]["out"]
    for entry in state["runs"] + state["arms"]:
        assert entry.pop("images_per_s") > 0
    return state


def test_a_comparison_killed_twice_resumes_to_the_same_table(
    short: Recipe, tmp_path: Path, server: Server, in_process: None, capsys
):
    short.checkpoint.every_updates = 1
    file, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    file.write_text(to_yaml(short))
    words = ("compare", file, "--arms", "plain,ce", "--seeds", "2", "--out")

    def finished() -> list[str]:
        found = stored(out) if (out / "results.json").exists() else {"runs": []}
        return [run["folder"] for run in found["runs"]]

    def kill_when(ready: Callable[[], object]) -> None:
        process = server.start(*words, out, script=_IN_A_THREAD)
        process.wait_until(ready, 300)
        process.kill()
        process.wait()

    kill_when(lambda: list(out.glob("*-seed0/last.pt")))  # within the first run
    kill_when(finished)  # within the second
    before = {name: (out / name / "last.pt").stat().st_mtime_ns for name in finished()}

    assert main([*map(str, words), str(out)]) == 0
    assert main([*map(str, words), str(tmp_path / "whole")]) == 0
    assert table(out) == table(tmp_path / "whole")
    for name, written in before.items():
        assert (out / name / "last.pt").stat().st_mtime_ns == written
    capsys.readouterr()
    assert main([*map(str, words), str(out)]) == 0  # nothing is left to train
    assert "paired seeds" in capsys.readouterr().out
    assert table(out) == table(tmp_path / "whole")


def test_a_comparison_of_all_arms(short: Recipe, in_process: None, capsys):
    short.student.options = {**TINY}
    short.ema_decay = None
    found = compare(short, seeds=1, quiet=True).analysis
    assert [arm.name for arm in found.arms] == list(ARMS)
    out = Path(short.out)
    state = stored(out)
    assert (state["teacher"], state["finding"]) == ("cached", found.finding)
    assert {run["folder"] for run in state["runs"]} == {f"{name}-seed0" for name in ARMS}
    text = read_page(out / "report.html")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{found.finding}\n\n")
    for arm in found.arms:
        assert text.count(f"<td>{arm.name}</td>") == 3
        assert f"{arm.parameters:,}" in text
        row, _ = re.findall(rf"^{arm.name} +[\d,]+ .*$", printed, re.MULTILINE)
        assert f"{arm.top1.mean:.2f}" in row
    assert printed.count("nothing can be concluded") == len(ARMS)

    # the same arms without a cache train to the same weights
    alone = arm_recipe(short, "widelast", 0, out.parent / "alone", None)
    train("widelast", alone)
    assert same_weights(Path(alone.out) / "last.pt", out / "widelast-seed0" / "last.pt")
    with pytest.raises(ValueError, match=r"another comparison: batch_size: 8 -> 4; expected"):
        compare(replace(short, batch_size=4), seeds=1)


def test_maps_are_measured_once(short: Recipe, in_process: None, monkeypatch):
    short.ema_decay = None
    found = compare(short, "plain,lift", seeds=1, quiet=True)
    # the teacher's reach, from one singular value decomposition of all its tokens
    own = arm_recipe(short, "plain", 0, Path(short.out), None)
    with closing(build(own, start("cpu"))) as run, torch.no_grad():
        maps = [run.teacher_model.forward_maps(x.images, [-1])[0] for x in run.val_loader]
    energy = torch.linalg.svdvals(torch.cat(maps).flatten(0, 1).double()).square()
    reach = energy.cumsum(0) / energy.sum()
    assert found.teacher.reach == pytest.approx(reach.tolist(), abs=1e-6)
    assert (found.teacher.images, found.teacher.figures.channels) == (12, 24)

    plain, lift = (arm.map for arm in found.analysis.arms)
    assert (plain.width, plain.channels, lift.width, lift.channels) == (12, 12, 12, 24)
    checkpoint = str(Path(short.out) / "plain-seed0" / "last.pt")
    images = str(Path(short.data.path) / "val")
    config = DiagnoseConfig(model=checkpoint, data=images, workers=0, layers=[-1], device="cpu")
    (layer,) = diagnose(config, quiet=True).layers.values()
    assert plain.rank == layer.spectrum.summaries[1].percentile99
    assert plain.overlap == pytest.approx(layer.rotation.pair_mean, abs=1e-4)
    assert plain.used == pytest.approx(layer.bandwidth.channels90_mean, abs=1e-4)

    def compare_again() -> None:
        again = compare(short, "plain,lift", seeds=1, quiet=True)
        assert (again.analysis, again.teacher) == (found.analysis, found.teacher)

    with monkeypatch.context() as patch:
        patch.setattr(LayerDiagnostics, "update", None)  # not called again
        compare_again()
    # a file written before maps were measured
    state = stored(short.out)
    for entry in (state, *state["runs"]):
        del entry["teacher_map" if entry is state else "map"]
    (Path(short.out) / "results.json").write_text(json.dumps(state))
    written = Path(checkpoint).stat().st_mtime_ns
    compare_again()
    assert Path(checkpoint).stat().st_mtime_ns == written


def test_the_reason_is_shown_if_maps_cannot_be_measured(
    short: Recipe, in_process: None, monkeypatch, capsys
):
    measured = Mock(wraps=mismatch.measure_teacher)
    monkeypatch.setattr("featkd.compare.run.measure_teacher", measured)
    fails = Mock(side_effect=ValueError("features: hold NaN or Inf"))
    monkeypatch.setattr(LayerDiagnostics, "update", fails)
    for seeds in (2, 3):
        found = compare(short, "plain", seeds=seeds)
        assert (found.teacher, found.analysis.arms[0].map) == (None, None)
        assert measured.call_count == 1
        said, page = capsys.readouterr(), unescape(read_page(Path(short.out) / "report.html"))
        for name in ("the teacher", *(f"plain, seed {seed}" for seed in range(seeds))):
            reason = f"the map of {name} could not be measured: features: hold NaN or Inf"
            assert (said.out.count(reason), page.count(reason)) == (1, 1)
        # the notes of the cache are equal for all seeds
        assert said.err.count("teacher's outputs for seed") == {2: 2, 3: 1}[seeds]
        assert said.err.count("size of the cache") == 1
    state = stored(short.out)
    maps = [state["teacher_map"], *(run["map"] for run in state["runs"])]
    assert maps == ["features: hold NaN or Inf"] * 4


def test_images_without_augmentation_are_cached_once(short: Recipe, in_process: None):
    augment = load_recipe(find_recipe("demo")).data.augment
    short.data = replace(short.data, augment=augment)
    short.optim = replace(short.optim, epochs=2)
    short.student.options = {**TINY}
    compare(short, "plain", seeds=1, quiet=True)
    out = Path(short.out)
    assert json.loads((out / "cache" / "seed-0" / "manifest.json").read_text())["views"] == 1
    alone = arm_recipe(short, "plain", 0, out.parent / "alone", None)
    train("plain", alone)
    losses, expected = (
        [float(row["loss"]) for row in read_csv(folder / "metrics.csv")]
        for folder in (out / "plain-seed0", Path(alone.out))
    )
    assert losses == pytest.approx(expected, rel=1e-5)


def test_the_teacher_runs_if_images_are_mixed(short: Recipe, in_process: None, capsys):
    short.data = replace(short.data, augment=replace(short.data.augment, mixup=0.2))
    compare(short, "plain", seeds=1, quiet=True)
    printed = capsys.readouterr().out
    assert "teacher: ran in every update, because mixup" in printed
    assert "ema_decay: with 0.9 the average consists of the initial weights to 53 %" in printed
    assert not (Path(short.out) / "cache").exists()


def test_another_folder_or_none_is_refused_and_help_lists_every_arm(
    short: Recipe, tmp_path: Path, capsys
):
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(short))
    assert main(["compare", str(file), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"featkd: out: {tmp_path} holds recipe.yaml; expected a comparison")
    assert main(["compare", str(file)]) == 2
    assert "--out: expected the folder of the comparison" in capsys.readouterr().err
    assert all(name in command.parser().format_help() for name in ARMS)
