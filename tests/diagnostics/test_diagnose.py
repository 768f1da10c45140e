"""`featkd diagnose` as a user meets it: report, processes, kills, states, messages."""

from __future__ import annotations

import html
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from featkd import diagnose
from featkd.cli import main
from featkd.diagnostics import run
from featkd.distributed import ProcessContext
from featkd.models import create_teacher
from featkd.train.engine import Trainer
from featkd.train.recipe import LossConfig
from tests.diagnostics import published
from tests.diagnostics.maps import feature_maps
from tests.page import Page

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--sample", "5", "--permuted", "3", "--permutations", "5", "--k", "3")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """60 files as published: two layers, a class token and 5 x 5 patches, 24 channels."""
    folder = tmp_path_factory.mktemp("features")
    maps = feature_maps(120, 26, 24).unflatten(0, (60, 2))
    for number, m in enumerate(maps):
        np.save(folder / f"{number:03}.npy", m.numpy())
    return folder


def arguments(features, out, *more):
    words = ("diagnose", "--features", features, "--out", out, "--batch-size", "4", *QUICK, *more)
    return [str(word) for word in words]


def figures(out):
    """What must not depend on how a run went."""
    summary = json.loads((out / "summary.json").read_text())
    for name in ("about", "images_per_s"):
        del summary[name]
    return summary, (out / "per_image.safetensors").read_bytes(), (out / "curves.csv").read_text()


@pytest.fixture(scope="module")
def alone(features, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert main(arguments(features, out)) == 0
    return out


def test_report_tables_and_figures(features, alone):
    summary = json.loads((alone / "summary.json").read_text())
    assert (summary["schema"], summary["images"], len(summary["layers"])) == (1, 60, 2)
    maps = np.stack([np.load(path) for path in sorted(features.glob("*.npy"))])[:, 1, 1:]
    ranks, _ = published.spectrum(maps, (0.8, 0.9, 0.95, 0.99))
    _, vectors = published.dataset_pca(maps)
    dims, _ = published.captured(maps, vectors, (0.8, 0.9, 0.95, 0.99))
    for kind, expected in (("svd", ranks), ("pca", dims)):
        for column, level in zip(expected.T, ("0.8", "0.9", "0.95", "0.99"), strict=True):
            found = summary["layers"][1][kind][level]
            assert found["percentile99"] == round(np.percentile(column, 99))
            assert found["mean"] == pytest.approx(column.mean())
    assert not (alone / "state").exists()

    page = Page()
    page.feed((alone / "report.html").read_text())
    assert not page.open
    assert page.tags.count("svg") == 5  # four of the last layer, one over the layers
    assert all(
        link.startswith(("#", "data:image/png")) for link in page.links
    )  # nothing from elsewhere
    drawn = sorted(path.name for path in (alone / "figures").iterdir())
    assert len(drawn) == 10
    assert (alone / "figures" / drawn[0]).read_bytes().startswith(b"\x89PNG")
    assert len((alone / "ranks.csv").read_text().splitlines()) == 1 + 2 * 2 * 4

    names = (alone / "images.csv").read_text().splitlines()
    assert (names[0], len(names)) == ("index,name", 61)
    assert names[8] == f"7,{features}/007.npy"
    tensors = safetensors.torch.load_file(alone / "per_image.safetensors")
    assert tensors["model.1.ranks"][7].tolist() == ranks[7].tolist()
    chosen = tensors["model.1.rotation_images"].tolist()
    first, second = (np.load(features / f"{n:03}.npy")[1, 1:] for n in chosen[:2])
    overlap = tensors["model.1.rotation_overlap"][0, 1].item()
    assert overlap == pytest.approx(published.overlap(first, second, 3), abs=1e-6)
    assert tensors["model.1.rotation_overlap_dataset"].shape == (5,)
    heat_map = (alone / "figures" / "rotation-model-1.svg").read_text()
    for index in chosen:
        assert heat_map.count(f"<!-- {index} -->") >= 2  # on both axes


@pytest.mark.parametrize(
    ("processes", "local", "launcher"),
    [
        (1, None, "featkd"),
        (4, "4", "torchrun --nproc-per-node 4 -m featkd"),
        (8, "4", "torchrun --nnodes 2 --nproc-per-node 4 -m featkd"),
        (2, None, "torchrun --nproc-per-node 2 -m featkd"),  # not torchrun's, but the same run
    ],
)
def test_the_command_has_its_launcher(monkeypatch, processes, local, launcher):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    words = ["--out", "a b"]
    assert diagnose._command(words, processes) == f"{launcher} diagnose --out 'a b'"


@pytest.mark.slow
def test_four_processes_give_the_same(features, alone, tmp_path):
    words = ["torch.distributed.run", "--nproc-per-node", "4", "--standalone"]
    command = [sys.executable, "-m", *words, "-m", "featkd", *arguments(features, tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert figures(tmp_path) == figures(alone)
    about = json.loads((tmp_path / "summary.json").read_text())["about"]
    assert about["command"].startswith("torchrun --nproc-per-node 4 -m featkd diagnose --features")


def test_a_lost_process_is_named(features, tmp_path, server):
    """Process 1 stops at its file with a NaN; process 0 waits for it at the end of the pass."""
    folder = tmp_path / "features"
    folder.mkdir()
    for path in sorted(features.glob("*.npy"))[:8]:
        m = np.load(path)
        if path.name == "006.npy":
            m[0, 7, 3] = np.nan
        np.save(folder / path.name, m)
    ranks = server.ranks(2, *arguments(folder, tmp_path / "out", "--device", "cpu"))
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert "006.npy: layer 0: NaN" in ranks[1].stderr
    said = ranks[0].stderr.splitlines()[-1]
    assert said.startswith("featkd: another process of the run has ended")
    assert f"the same command goes on from {tmp_path}/out/state" in said
    assert "Traceback" not in ranks[0].stderr


def test_killed_and_resumed_gives_the_same(features, alone, tmp_path):
    words = arguments(features, tmp_path, "--save-seconds", "0", "--batch-size", "4")
    state = tmp_path / "state" / "process-0-of-1.pt"
    process = subprocess.Popen([sys.executable, "-m", "featkd", *words])
    while process.poll() is None and not state.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was faster than the kill"
    assert torch.load(state)["state"]["pass"] == 1
    assert main(words) == 0
    assert figures(tmp_path) == figures(alone)
    assert not (tmp_path / "state").exists()


def test_state_of_another_run_is_refused(features, tmp_path, capsys, monkeypatch):
    interrupted = run.LayerDiagnostics.update

    def fail_late(self, *arguments):
        if self.images >= 8:
            raise OSError(28, "No space left on device")
        interrupted(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run.LayerDiagnostics, "update", fail_late)
        assert main(arguments(features, tmp_path, "--save-seconds", "0")) == 1
    assert "No space left" in capsys.readouterr().err
    assert main(arguments(features, tmp_path, "--layers", "[1]")) == 1
    message = capsys.readouterr().err
    assert "is the state of another run" in message
    assert "layers: [0, 1] there, [1] here" in message
    assert main(arguments(features, tmp_path, "--resume", "never", "--layers", "[1]")) == 0


def test_a_full_disk_costs_nothing_that_was_saved(features, alone, tmp_path, server):
    """The write of a kept map fails half-way; the same command goes on, given more room."""
    words = arguments(features, tmp_path, "--save-seconds", "0", "--device", "cpu")
    size = 80_000  # more than a state takes, and half of what is kept of a layer
    failed = server.call(*words, file_size=size)
    assert failed.returncode == 1
    message = f"File too large: '{tmp_path}/state/kept-0-of-process-0.bin'"
    assert message in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    kept = (tmp_path / "state" / "kept-0-of-process-0.bin").stat().st_size
    state = torch.load(tmp_path / "state" / "process-0-of-1.pt")["state"]
    seen = sum(state["kept"]["lengths"])
    assert seen * 25 * 24 * 4 < kept == size  # the failed write left a part behind
    assert server.call(*words).returncode == 0
    assert figures(tmp_path) == figures(alone)


@pytest.mark.parametrize("keep", ["bf16", "never", "budget"])
def test_features_that_are_not_kept(features, alone, tmp_path, capsys, keep):
    more = ("--budget-gib", "1e-6") if keep == "budget" else ("--keep", keep)
    assert main(arguments(features, tmp_path, *more)) == 0
    summary, mine = (json.loads((o / "summary.json").read_text()) for o in (alone, tmp_path))
    if keep == "bf16":
        assert mine["layers"][0]["svd"] == summary["layers"][0]["svd"]
        for level, found in mine["layers"][0]["pca"].items():
            expected = summary["layers"][0]["pca"][level]["mean"]
            assert found["mean"] == pytest.approx(expected, abs=0.3)
    else:
        assert mine["layers"][0]["pca"] is None
        assert "no file is read twice" in capsys.readouterr().out


def test_nan_features(features, tmp_path, capsys):
    folder = tmp_path / "features"
    folder.mkdir()
    for path in sorted(features.glob("*.npy"))[:9]:
        m = np.load(path)
        if path.name == "002.npy":
            m[0, 7, 3] = np.nan
        np.save(folder / path.name, m)
    assert main(arguments(folder, tmp_path / "out")) == 1
    assert "002.npy: layer 0: NaN, Inf" in capsys.readouterr().err
    assert main(arguments(folder, tmp_path / "out", "--on-bad", "skip", "--resume", "never")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"] == 8
    assert [name[-7:] for name in summary["left_out"]] == ["002.npy"]
    out = capsys.readouterr().out
    assert "Images left out, by name in summary.json: 1" in out
    assert "200 tokens for 24 channels" in out


def test_what_a_run_left_before_its_first_state_is_not_taken_up(features, alone, tmp_path):
    """A NaN, a full disk or a kill in the first seconds leaves kept features and no state."""
    folder = tmp_path / "features"
    folder.mkdir()
    for path in features.glob("*.npy"):
        m = np.load(path)
        if path.name == "030.npy":
            m[0, 0, 0] = np.inf
        np.save(folder / path.name, m)
    assert main(arguments(folder, tmp_path / "out", "--prefix-tokens", "0")) == 1
    assert list((tmp_path / "out" / "state").glob("kept-*"))
    assert not list((tmp_path / "out" / "state").glob("*.pt"))
    assert main(arguments(features, tmp_path / "out")) == 0
    assert figures(tmp_path / "out") == figures(alone)


def test_a_dead_layer_costs_no_other_its_report(features, tmp_path, capsys):
    folder = tmp_path / "features"
    folder.mkdir()
    for path in sorted(features.glob("*.npy"))[:6]:
        m = np.load(path)
        m[0] = 0
        np.save(folder / path.name, m)
    assert main(arguments(folder, tmp_path / "out")) == 0
    assert "Layer 0 is left out: features: all of them are zero" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [r["layer"] for r in summary["layers"]] == [1]


def test_faint_features_are_measured_as_any_others(features, alone, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for path in sorted(features.glob("*.npy")):
        np.save(folder / path.name, np.load(path) * np.float32(2.0**-100))
    assert main(arguments(folder, tmp_path / "out")) == 0
    folders = (alone, tmp_path / "out")
    summary, mine = (json.loads((o / "summary.json").read_text()) for o in folders)
    for found, expected in zip(mine["layers"], summary["layers"], strict=True):
        for name in ("svd", "pca", "pca_of_all_tokens"):
            assert found[name] == expected[name]


@pytest.mark.parametrize("part", ["result", "captured"])
def test_a_layer_that_fails_at_the_end_costs_no_other_its_report(
    features, tmp_path, capsys, monkeypatch, part
):
    kind = {"result": run.LayerDiagnostics, "captured": run.CapturedEnergy}[part]
    result, calls = kind.result, []

    def fail_once(self):
        calls.append(self)
        if len(calls) == 1:
            raise ValueError("features: all of them are zero")
        return result(self)

    monkeypatch.setattr(kind, "result", fail_once)
    assert main(arguments(features, tmp_path, "--images", "8")) == 0
    assert "Layer 0 is left out: features: all of them are zero" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [r["layer"] for r in summary["layers"]] == [1]


def test_thresholds_near_each_other_keep_their_columns(features, tmp_path):
    near = ("--thresholds", "[0.9,0.9999999,1.0]", "--shares", "[0.5,0.50000001]")
    assert main(arguments(features, tmp_path, "--images", "8", "--layers", "[1]", *near)) == 0
    (layer,) = json.loads((tmp_path / "summary.json").read_text())["layers"]
    for name in ("svd", "pca", "pca_of_all_tokens"):
        assert list(layer[name]) == ["0.9", "0.9999999", "1"]
    page = (tmp_path / "report.html").read_text()
    for text in ("<th>90 %</th>", "<th>99.99999 %</th>", "<th>100 %</th>", "<th>50.000001 %</th>"):
        assert text in page
    for name, column, texts in (
        ("ranks", 3, {"0.9", "0.9999999", "1"}), ("sep", 2, {"0.5", "0.50000001"})
    ):  # fmt: skip
        rows = (tmp_path / f"{name}.csv").read_text().splitlines()[1:]
        assert {row.split(",")[column] for row in rows} == texts


def test_a_bar_begins_where_the_run_goes_on(monkeypatch):
    """Or the images of before would count into its rate."""
    bars = []
    tqdm = diagnose.tqdm
    monkeypatch.setattr(diagnose, "tqdm", lambda **k: bars.append(k) or tqdm(**k))
    with diagnose._Progress(ProcessContext(0, 1, torch.device("cpu"))) as progress:
        for number, done in ((1, 40), (1, 44), (2, 0), (2, 4)):
            progress(number, done, 60)
    assert [bar["initial"] for bar in bars] == [40, 0]


@pytest.mark.parametrize("channels", [24, 64, 96])
def test_gaussian_features_are_called_the_null(tmp_path, capsys, channels):
    folder = tmp_path / "features"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        np.save(folder / f"{number}.npy", torch.randn(49, channels, generator=generator).numpy())
    assert main(arguments(folder, tmp_path / "out")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = summary["layers"][0]["sep"]["d_over_D"]
    assert np.allclose(found, (0.5, 0.6, 0.7, 0.8, 0.9), atol=1.1 / channels)
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (capsys.readouterr().out, html.unescape(page)):
        assert "This equals the null" in text
        assert "the maps' ranks are no lower than noise of their size has" in text
        assert "rotate from image" not in text


@pytest.mark.parametrize("layers", [None, "[-1,0]"])
def test_student_and_teacher(images, tmp_path, capsys, layers):
    options = '{"patch_size": 4, "depth": 2, "num_heads": 3, "embed_dim": 12}'
    words = ("--student", "vit_tiny_patch16_224", "--teacher", "vit_tiny_patch16_224")
    wide = '{"patch_size": 4, "depth": 2, "num_heads": 3, "embed_dim": 24}'
    shared = ("--data", images, "--img-size", "16", "--workers", "0", *QUICK)
    if layers is not None:
        shared += ("--layers", layers)
    options = ("--student-options", options, "--teacher-options", wide)
    call = [str(w) for w in ("diagnose", *words, *options, *shared, "--out", tmp_path)]
    assert main(call) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    order = (0, 1) if layers is None else (1, 0)
    assert [(r["model"], r["layer"]) for r in summary["layers"]] == [
        (model, layer) for model in ("student", "teacher") for layer in order
    ]
    (last,) = (r for r in summary["reach"] if r["teacher"] == "teacher layer 1")
    assert (last["channels"], last["teacher_channels"]) == (12, 24)
    assert 0 < last["pooled"] < last["shared"] <= last["shared_with_bias"] < 1
    assert last["shared"] < last["per_image"] <= 1
    said = capsys.readouterr()
    assert "random weights" in said.err
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "What the student can reach" in page
    for text in (said.out, page):  # of the layers in focus, the last ones
        assert "Teacher layer 1, 12 against 24 channels." in text
        assert "Teacher layer 0, 12 against" not in text


STUDENT, TEACHER = ({"embed_dim": width, "depth": 2, "num_heads": 3} for width in (12, 24))


@pytest.fixture
def trained(recipe):
    """The checkpoint of a plain student of 16 x 16 pixels."""
    student = replace(recipe.student, arch="plain", options=STUDENT | {"patch_size": 4})
    optim = replace(recipe.optim, epochs=1, warmup_epochs=0)
    run = replace(recipe, student=student, teacher=None, loss=LossConfig(), optim=optim)
    Trainer(run, ProcessContext(0, 1, torch.device("cpu"))).run()
    return Path(run.out) / "last.pt"


def test_pretrained_and_img_size_are_for_the_side_that_can_use_them(
    trained, images, tmp_path, capsys, monkeypatch
):
    """A checkpoint of featkd has both; timm's teacher beside it has not."""
    asked = []

    def without_network(name, pretrained=False, **options):
        asked.append((pretrained, options["img_size"]))
        return create_teacher(name, **options)

    monkeypatch.setattr(diagnose, "create_teacher", without_network)
    words = ("diagnose", "--student", trained, "--data", images, "--out", tmp_path / "out")
    words += ("--pretrained", "--workers", "0", "--images", "8", *QUICK)
    timm = ("--teacher", "vit_tiny_patch16_224")
    timm += ("--teacher-options", json.dumps(TEACHER | {"patch_size": 4}))
    assert main([str(w) for w in (*words, *timm, "--img-size", "16")]) == 0
    assert asked == [(True, 16)]
    err = capsys.readouterr().err
    assert "random weights" not in err
    assert main([str(w) for w in (*words, *timm, "--img-size", "32")]) == 2
    assert f"img_size: got 32 beside {trained}, which is for 16" in capsys.readouterr().err
    assert main([str(w) for w in (*words, "--teacher", trained)]) == 2
    message = f"without a file of weights, got {trained} and {trained}"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("below", [".", "report/deep"])
def test_out_must_not_lie_among_the_images(images, monkeypatch, capsys, below):
    """Its figures are PNGs, which the next run would look at; nor among feature files."""
    monkeypatch.chdir(images)
    words = ["diagnose", "--model", "vit_tiny_patch16_224", "--out", below]
    assert main([*words, "--data", str(images)]) == 2
    message = f"out: expected a folder outside of data, {images}, where"
    assert message in capsys.readouterr().err
    assert main(["diagnose", "--features", below, "--out", str(images / below)]) == 2
    assert "out: expected another folder than features, got" in capsys.readouterr().err
    assert not (images / "report").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected --features, --model, or --student and --teacher; got none"),
        (("--model", "deit_tiny_patch16_224"), "data: expected a folder of images"),
        (("--student", "deit_tiny_patch16_224"), "--student and --teacher; got student"),
        (("--features", "x", "--data", "y"), "features: given together with --data"),
        (("--features", "/none"), "features: expected a folder of feature files, got /none"),
        (("--feature", "x"), "no option --feature; did you mean 'features'?"),
        (("--model", "deit_tinny_patch16_224", "--data", "/usr"), "did you mean 'deit_tiny"),
        (("--model", "none.pt", "--data", "/usr"), "model: no checkpoint none.pt"),
        (("--features", "/tmp", "--layers", "[]"), "layers: expected layers, each once, got []"),
        (("--features", "/tmp", "--images", "0"), "images: expected a whole number >= 1, got 0"),
        (("--features", "/tmp", "--pretrained"), "pretrained: given together with --features"),
        (("--features", "/tmp", "--json", "/none/x.json"), "json: no folder /none"),
        (("--k", "0", "--features", "/none"), "k: expected a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments(words, message, tmp_path, capsys):
    assert main(["diagnose", *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
