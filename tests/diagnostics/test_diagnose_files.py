"""`diagnose` of feature files, from Python and from the command line: output, options, errors."""

from __future__ import annotations

import html
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from featkd.cli import diagnose as command
from featkd.cli.main import main
from featkd.diagnostics import DiagnoseConfig, Settings, diagnose
from tests.diagnostics import published
from tests.diagnostics.commands import arguments, copy_with_bad_value, figures
from tests.page import Page

pytestmark = pytest.mark.usefixtures("one_thread")


def test_report_tables_and_figures(features, uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
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
    assert not (uninterrupted / "state").exists()

    page = Page()
    page.feed((uninterrupted / "report.html").read_text())
    assert not page.open
    assert page.tags.count("svg") == 5  # four of the last layer, one over the layers
    assert all(link.startswith(("#", "data:image/png")) for link in page.links)  # nothing external
    drawn = sorted(path.name for path in (uninterrupted / "figures").iterdir())
    assert len(drawn) == 10
    assert (uninterrupted / "figures" / drawn[0]).read_bytes().startswith(b"\x89PNG")
    assert len((uninterrupted / "ranks.csv").read_text().splitlines()) == 1 + 2 * 2 * 4

    names = (uninterrupted / "images.csv").read_text().splitlines()
    assert (names[0], len(names)) == ("index,name", 61)
    assert names[8] == f"7,{features}/007.npy"
    tensors = safetensors.torch.load_file(uninterrupted / "per_image.safetensors")
    assert tensors["model.1.ranks"][7].tolist() == ranks[7].tolist()
    chosen = tensors["model.1.rotation_images"].tolist()
    first, second = (np.load(features / f"{n:03}.npy")[1, 1:] for n in chosen[:2])
    overlap = tensors["model.1.rotation_overlap"][0, 1].item()
    assert overlap == pytest.approx(published.overlap(first, second, 3), abs=1e-6)
    assert tensors["model.1.rotation_overlap_dataset"].shape == (5,)
    heat_map = (uninterrupted / "figures" / "rotation-model-1.svg").read_text()
    for index in chosen:
        assert heat_map.count(f"<!-- {index} -->") >= 2  # on both axes


@pytest.mark.usefixtures("no_figures")
def test_python_call_equals_command_line(features, uninterrupted, tmp_path):
    settings = Settings(sample=5, permuted=3, permutations=5, k=3)
    findings = diagnose(DiagnoseConfig(features=str(features), batch_size=4, settings=settings))
    assert not list(tmp_path.iterdir())  # without out nothing is written
    assert findings.write(tmp_path / "out") == tmp_path / "out" / "report.html"
    assert figures(tmp_path / "out") == figures(uninterrupted)
    command = json.loads((tmp_path / "out" / "summary.json").read_text())["about"]["command"]
    assert command.startswith(f"featkd.diagnostics.diagnose(DiagnoseConfig(features='{features}'")


@pytest.mark.parametrize("keep", ["bf16", "never", "budget"])
def test_keep_and_budget(features, uninterrupted, tmp_path, capsys, keep, request):
    if keep != "never":  # "budget" draws the same figures
        request.getfixturevalue("no_figures")
    more = ("--budget-gib", "1e-6") if keep == "budget" else ("--keep", keep)
    assert main(arguments(features, tmp_path, *more)) == 0
    summary, mine = (
        json.loads((o / "summary.json").read_text()) for o in (uninterrupted, tmp_path)
    )
    if keep == "bf16":
        assert mine["layers"][0]["svd"] == summary["layers"][0]["svd"]
        for level, found in mine["layers"][0]["pca"].items():
            expected = summary["layers"][0]["pca"][level]["mean"]
            assert found["mean"] == pytest.approx(expected, abs=0.3)
    else:
        assert mine["layers"][0]["pca"] is None
        assert "no file is read twice" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_nan_features(features, tmp_path, capsys):
    folder = copy_with_bad_value(features, tmp_path / "features", "002.npy", count=9)
    assert main(arguments(folder, tmp_path / "out")) == 1
    assert "002.npy: layer 0: NaN, Inf" in capsys.readouterr().err
    assert main(arguments(folder, tmp_path / "out", "--on-bad", "skip", "--resume", "never")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"] == 8
    assert [name[-7:] for name in summary["left_out"]] == ["002.npy"]
    out = capsys.readouterr().out
    assert "Images left out, listed in summary.json: 1" in out
    assert "200 tokens for 24 channels" in out


@pytest.mark.usefixtures("no_figures")
def test_layer_of_zeros_is_left_out(features, tmp_path, capsys):
    folder = copy_with_bad_value(features, tmp_path / "features", "*", count=6, at=0, value=0)
    assert main(arguments(folder, tmp_path / "out")) == 0
    assert "Layer 0 is left out: features: all of them are zero" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [r["layer"] for r in summary["layers"]] == [1]


def test_thresholds_close_to_each_other(features, tmp_path):
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


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("channels", [24, 64, 96])
def test_report_on_gaussian_features(tmp_path, capsys, channels):
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
        assert "the maps' energy ranks are no lower than those of noise of the same size" in text
        assert "rotate from image" not in text


def test_out_is_required_and_a_name_even_if_it_reads_null(capsys):
    parser = command.parser()
    assert parser.parse_args(["--features", "x", "--out", "null"]).out == "null"
    assert main(["diagnose", "--features", "x"]) == 2
    assert "arguments are required: --out" in capsys.readouterr().err


@pytest.mark.parametrize("below", [".", "report/deep"])
def test_out_must_not_lie_below_data(images, monkeypatch, capsys, below):
    """The next run would read the report's PNGs as images; feature files are checked too."""
    monkeypatch.chdir(images)
    words = ["diagnose", "--model", "vit_tiny_patch16_224", "--out", below]
    assert main([*words, "--data", str(images)]) == 2
    message = f"out: expected a folder outside of data, {images}, because"
    assert message in capsys.readouterr().err
    assert main(["diagnose", "--features", below, "--out", str(images / below)]) == 2
    assert "out: expected another folder than features, got" in capsys.readouterr().err
    assert not (images / "report").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected features, model, or student and teacher; got none"),
        (("--model", "deit_tiny_patch16_224"), "data: expected a folder of images"),
        (("--student", "deit_tiny_patch16_224"), "or student and teacher; got student"),
        (("--features", "x", "--data", "y"), "features: given together with data"),
        (("--features", "/none"), "features: expected a folder of feature files, got /none"),
        (("--feature", "x"), "no option '--feature'; did you mean '--features'?"),
        (("--model", "deit_tinny_patch16_224", "--data", "/usr"), "did you mean 'deit_tiny"),
        (("--model", "none.pt", "--data", "/usr"), "model: no checkpoint none.pt"),
        (
            ("--features", "/tmp", "--layers", "[]"),
            "layers: expected at least one index, each only once; got []",
        ),
        (("--features", "/tmp", "--images", "0"), "images: expected a whole number >= 1, got 0"),
        (("--features", "/tmp", "--pretrained"), "pretrained: given together with features"),
        (("--features", "/tmp", "--json", "/none/x.json"), "json: no folder /none"),
        (("--k", "0", "--features", "/none"), "k: expected a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments(words, message, tmp_path, capsys):
    assert main(["diagnose", *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
