"""Names that no terminal may act on, names that are not UTF-8, and --quiet."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

import featkd
from featkd.benchmarks import step
from featkd.cli.main import main
from featkd.cli.output import PrintableStream, plain_warnings
from tests.diagnostics.commands import QUICK
from tests.test_demo import InProcessPool, write_few_digits

NAME, SHOWN = os.fsdecode(b"\x1b]0;owned\x07caf\xe9"), r"\x1b]0;owned\x07caf\xe9"
MODEL = ("--model", "vit_tiny_patch16_224", "--img-size", "16", "--model-options")
OPTIONS = '{"patch_size": 4, "depth": 2, "num_heads": 3, "embed_dim": 12}'
SKIP = {
    "distill": ("--data.on-bad-image", "skip"),
    "cache": ("--data.on-bad-image", "skip"),
    "diagnose": ("--on-bad", "skip"),
}
TIMING = ("--batch-size", "4", "--rounds", "1")


def words_of(command: str, recipe_file: Path, data: Path, out: Path) -> list[str]:
    """A quick command line that trains on, caches, diagnoses or loads the images of a folder."""
    recipe = (recipe_file, "--data", data, "--data.augment.rand-augment", "null")
    short = ("--optim.epochs", "1", "--optim.warmup-epochs", "0")
    words = {
        "distill": (*recipe, *short, "--out", out),
        "cache": (*recipe, "--out", out),
        "diagnose": (*MODEL, OPTIONS, "--data", data, "--workers", "0", *QUICK, "--out", out),
        "bench loader": (
            "--data",
            data,
            "--variants",
            "timm/plain",
            "--images",
            "8",
            "--workers",
            "0",
            *TIMING,
        ),
        "bench step": (recipe_file, "--data", data, "--device", "cpu", *TIMING),
        "demo": ("--seeds", "1", "--epochs", "1", "--out", out),
    }
    return [*command.split(), *map(str, words[command])]


@pytest.fixture
def one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves one variant of an update to time."""
    ways = {"eager_fp32": step.Way("off", False, "reference")}
    monkeypatch.setattr(step, "ways", lambda device: ways)


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    """Images in a folder and class folders named NAME, with a damaged image per split."""
    root = tmp_path / NAME
    shutil.copytree(images, root)
    for split in ("train", "val"):
        (root / split / "blue").rename(root / split / NAME)
        (root / split / NAME / "0.png").write_text(f"no picture of {split}")
    return root


@pytest.mark.parametrize("command", ["distill", "cache", "diagnose", "bench loader", "bench step"])
def test_names_are_printed_with_escapes(command, broken, recipe_file, one_way, capsys):
    out = broken.parent / f"{NAME}-out"
    words = words_of(command, recipe_file, broken, out)
    assert main(words) == 1  # the damaged image
    if command in SKIP:
        assert main([*words, *SKIP[command]]) == 0
    said = capsys.readouterr()
    assert f"{SHOWN}/0" in said.err
    assert SHOWN in said.out
    for text in said:
        assert all(line.isprintable() for line in text.split("\n"))
    if command == "distill":
        assert (out / "last.pt").exists()
        assert list((out / "tensorboard").iterdir())
    if command == "diagnose":
        with open(out / "images.csv", encoding="utf-8", errors="surrogateescape") as file:
            found = [row["name"] for row in csv.DictReader(file)]
        assert sorted(found) == sorted(map(str, broken.rglob("*.png")))
        bad = [str(broken / split / NAME / "0.png") for split in ("train", "val")]
        assert sorted(json.loads((out / "summary.json").read_text())["left_out"]) == sorted(bad)
        page = (out / "report.html").read_text()
        assert SHOWN in page
        assert all(line.isprintable() for line in page.split("\n"))


def test_streams_keep_bars_and_escape_the_rest(capsys):
    for text in ("\r 50%|█▌ |\r", "\r", "a\tb\n", ""):
        assert PrintableStream(sys.stdout).write(text) == len(text)
        assert capsys.readouterr().out == text
    PrintableStream(sys.stdout).writelines(["a\rb\n", "\u202egpj.exe\x85\r"])
    assert capsys.readouterr().out == "a\\x0db\n\\u202egpj.exe\\x85\r"


def test_a_bug_shows_a_traceback_with_escapes(server):
    script = r"""
import sys
import warnings
from featkd.cli import env, main

def fails():
    raise AssertionError("\x1b]0;owned\x07")

env.environment_facts = fails
sys.argv = ["featkd", "env"]
main.main()
"""
    done = server.call(script=script)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("AssertionError: \\x1b]0;owned\\x07\n")


@pytest.mark.parametrize("command", ["distill", "cache", "diagnose", "bench loader", "demo"])
def test_quiet_prints_warnings_and_errors_only(
    command, broken, images, recipe_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(PrintableStream, "isatty", lambda _: True, raising=False)  # for bars
    monkeypatch.setattr("featkd.compare.pool.ProcessPoolExecutor", InProcessPool)
    monkeypatch.setattr("featkd.demo.run.write_digits", write_few_digits)
    monkeypatch.setattr("featkd.demo.run.CASES", {"demo": "plain"})
    data = broken if command in SKIP else images
    words = words_of(command, recipe_file, data, tmp_path / "out")
    assert main([*words, *SKIP.get(command, ()), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert bool(said.err) == (command in SKIP)
    for line in said.err.splitlines():
        assert re.match("unreadable image no. |featkd: unreadable images: |featkd: 2 images", line)


def test_only_warnings_of_featkd_are_shown_without_a_line_of_source():
    standard = warnings.formatwarning
    with plain_warnings():
        own = warnings.formatwarning("few images", UserWarning, featkd.__file__, 1)
        other = warnings.formatwarning("slow", UserWarning, torch.__file__, 1)
    assert own == "featkd: few images\n"
    assert other == standard("slow", UserWarning, torch.__file__, 1)
    assert warnings.formatwarning is standard
