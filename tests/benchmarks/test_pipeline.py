"""`featkd bench loader` and `step`: their figures, output and errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featkd.benchmarks import loader, step
from featkd.benchmarks.loader_overhead import overhead_loader
from featkd.benchmarks.photographs import photographs
from featkd.benchmarks.throughput import Rate
from featkd.cli.main import main
from featkd.data import DataConfig
from featkd.data.dali.loader import DaliLoader
from featkd.train.recipe import to_yaml
from featkd.train.trainer import Trainer
from tests.train.runs import CPU

EAGER = step.Way("off", False, "reference")
OTHERS = {
    "featkd": step.Way("off", False, "auto"),
    "featkd_bf16": step.Way("bf16", False, "auto"),
    "cached": step.Way("off", False, "auto", cached=True),
    "cached_bf16": step.Way("bf16", False, "auto", cached=True),
}


def dali_loader(config: DataConfig, batch_size: int) -> DaliLoader:
    pytest.importorskip("nvidia.dali")
    config = replace(config, backend="dali")
    return loader.build_loader(config, split="train", batch_size=batch_size)


@pytest.fixture
def still(recipe):
    """The tiny recipe without drop-path, whose forward pass is random."""
    options = recipe.student.options | {"drop_path_rate": 0.0}
    return replace(recipe, student=replace(recipe.student, options=options))


@pytest.fixture
def recipe_file(still, tmp_path) -> str:
    """The recipe in a file, with more classes than the images have."""
    still = replace(still, student=replace(still.student, num_classes=7))
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(still))
    return str(path)


def bench(*words: str) -> dict[tuple[str, str, str], float]:
    """Runs a command and returns its figures by (name, variant, metric)."""
    report = Path(words[-1])
    assert main(["bench", *words]) == 0
    rows = json.loads(report.read_text())["rows"]
    figures = {(r["name"], r["variant"], r["metric"]): r["value"] for r in rows}
    assert len(figures) == len(rows)
    return figures


def test_rates_are_of_the_median_round():
    rate = Rate("loader", "x", 12, [4.0, 1.0, 2.0])
    assert (rate.images_per_s, rate.ms_per_image) == (6, pytest.approx(1e3 / 6))
    figures = {metric: value for _, _, metric, _, value in rate.figures()}
    assert figures["images_per_s_q20"] < 6 < figures["images_per_s_q80"]
    assert figures["rounds"] == 3


@pytest.mark.parametrize("flat", [True, False])
def test_photographs_are_repeated_or_thinned(images, flat):
    folder = str(images / "train" if flat else images)
    with photographs(folder, DataConfig(), 100) as photos:  # 48 of 3 classes
        links = list(Path(photos.data.path).rglob("*.png"))
        assert (len(photos.paths), len(links)) == (48, 144)
        assert {link.resolve() for link in links} == {Path(p).resolve() for p in photos.paths}
        assert "48, 3 times each" in photos.about
    assert not links[0].exists()
    with photographs(folder, DataConfig(), 6) as photos:
        assert {Path(path).parent.name for path in photos.paths} == {"blue", "green", "red"}
        assert len(photos.paths) == 6


def test_loader_reports_what_could_not_be_built(images, tmp_path, monkeypatch, capsys):
    real = loader.build_loader

    def without_dali(config, **others):
        if config.backend == "dali":
            raise ValueError("no such thing here")
        return real(config, **others)

    monkeypatch.setattr(loader, "build_loader", without_dali)
    monkeypatch.setattr(loader, "_dali_decoder", lambda paths: lambda: None)
    report = tmp_path / "loader.json"
    words = ["loader", "--data", str(images), "--images", "8", "--batch-size", "4", "--rounds", "2"]
    words += ["--workers", "0", "--variants", "dali/plain", "timm/plain", "torchvision/plain"]
    figures = bench(*words, "--json", str(report))
    meta = json.loads(report.read_text())["meta"]
    assert meta["refused"] == {"dali/plain": "no such thing here"}
    assert str(images) in meta["images"]
    said = capsys.readouterr().out
    assert "dali/plain is left out: no such thing here" in said
    for name in ("loader", "augment"):
        for library in ("timm", "torchvision"):
            assert figures[name, f"{library}/plain", "images_per_s"] > 0
    assert not any(key[:2] == ("loader", "dali/plain") for key in figures)
    assert figures["overhead", "dali/plain", "images_per_s"] > 0
    assert figures["overhead", "dali/randaugment", "images_per_s"] > 0


def test_the_overhead_is_of_all_that_the_loader_does_without_pixels(images, monkeypatch):
    """The pipeline's inputs are those of DALI, from files in memory."""
    config = loader.with_form(DataConfig(str(images), img_size=16, workers=2), "randaugment")
    fed, real = [], DaliLoader._feed
    monkeypatch.setattr(DaliLoader, "_feed", lambda self: fed.append(real(self)) or fed[-1])

    def run(built):
        keys = torch.cat([batch.keys for batch in built])
        built.close()
        inputs = fed.copy()
        fed.clear()
        return keys, inputs

    keys, ours = run(overhead_loader(config, 4))
    expected, theirs = run(dali_loader(config, 4))
    assert torch.equal(keys, expected)
    assert len(ours) == len(theirs) == len(keys) // 4 > 3
    for mine, its in zip(ours, theirs, strict=True):
        for a, b in zip(mine, its, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    first = next(iter(overhead_loader(config, 4)))
    assert first.images.shape == (4, 3, 16, 16)


def test_every_loader_augments_alike():
    """torchvision's transforms have the same steps, RandAugment only in its form."""
    for form, count in (("plain", 0), ("randaugment", 1)):
        config = loader.with_form(DataConfig(), form)
        names = [type(s).__name__ for s in loader.torchvision_transform(config).transforms]
        assert names.count("RandAugment") == count
        assert {"RandomResizedCrop", "RandomHorizontalFlip", "RandomErasing"} <= set(names)
        assert (config.augment.rand_augment is not None) == bool(count)
        assert config.augment.repeats == 1


@pytest.mark.parametrize("arch", ["widelast", "lift"])  # Lift computes its feature loss itself
def test_parts_do_what_the_whole_update_does(still, arch):
    still = replace(still, student=replace(still.student, arch=arch))
    with step.built(still, CPU, {"eager": EAGER}) as trainers:
        trainer = trainers["eager"]
    batch = step.random_batch(trainer)
    parts = step.steps(trainer, batch, EAGER)
    assert tuple(parts) == step.PARTS
    parameters = list(trainer.components.student.parameters())
    torch.autograd.backward(trainer.losses(batch).total)
    want = [p.grad.clone() for p in parameters]
    parts["student"]()
    torch.testing.assert_close([p.grad for p in parameters], want)

    before = [p.detach().clone() for p in parameters]
    for name in ("teacher", "student", "loss"):
        parts[name]()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    parts["optimizer"]()
    moved = [p.detach().clone() for p in parameters]
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    parts["optimizer"]()  # its gradients are restored each time
    assert not any(torch.equal(p, old) for p, old in zip(parameters, moved, strict=True))
    assert trainer.update == 0
    parts["step"]()
    assert trainer.update == 1


def test_step_gives_every_part_in_every_variant(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "ways", lambda device: {"eager_fp32": EAGER, **OTHERS})
    words = ["step", recipe_file, "--batch-size", "4", "--rounds", "2", "--device", "cpu"]
    words += ["--variants", "eager_fp32", *OTHERS]
    figures = bench(*words, "--json", str(tmp_path / "step.json"))
    for variant in ("eager_fp32", *OTHERS):
        assert all(figures[part, variant, "images_per_s"] > 0 for part in step.PARTS)
        shares = [
            v for (_, of, kind), v in figures.items() if (of, kind) == (variant, "share_of_step")
        ]
        assert sum(shares) == pytest.approx(1)
    for variant in ("cached", "cached_bf16"):
        assert figures[step.STORE, variant, "images_per_s"] > 0
    assert figures["step", "eager_fp32", "speedup"] == 1
    said = capsys.readouterr().out
    assert "featkd_bf16: eager, bf16 autocast and teacher weights, featkd's fused ops" in said
    assert "cached: eager, float32, featkd's fused ops, the teacher's outputs from a cache" in said


@pytest.mark.parametrize("fast", [True, False])
def test_featkd_is_compared_with_plain_torch_in_its_own_precision(monkeypatch, fast):
    monkeypatch.setattr(step, "has_fast_bf16", lambda device: fast)
    for device in ("cpu", "cuda"):
        known = step.ways(torch.device(device))
        plain = {w.amp: name for name, w in known.items() if w.backend == "reference"}
        assert {"off", known["featkd"].amp} == set(plain)
        assert known["featkd"].amp == known["compiled"].amp == ("bf16" if fast else "off")
        assert known["featkd"].graphs == (device == "cuda")


def test_tf32_is_used_by_its_variant_alone():
    before = torch.get_float32_matmul_precision()
    with step.Way("off", False, "reference", tf32=True).in_use():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_step_trains_on_the_images_of_a_folder(recipe_file, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "ways", lambda device: {"eager_fp32": EAGER})
    trained = []
    losses = Trainer.losses
    monkeypatch.setattr(
        Trainer, "losses", lambda *args: (trained.append(args[1]), losses(*args))[1]
    )
    words = ["step", recipe_file, "--batch-size", "4", "--rounds", "1", "--device", "cpu"]
    bench(*words, "--data", str(images), "--json", str(tmp_path / "step.json"))
    assert f"images: the images of {images / 'train'} (" in capsys.readouterr().out
    bench(*words, "--json", str(tmp_path / "step.json"))
    photographs, noise = trained[0].images, trained[-1].images
    assert photographs.shape == noise.shape
    assert not torch.equal(photographs, noise)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loader", "--variants", "timm/plane"], "did you mean 'timm/plain'"),
        (["loader", "--rounds", "0"], "--rounds: expected a finite number > 0, got 0"),
        (["loader", "--data", "/no/such"], "--data: no folder /no/such"),
        (["step", "widelast_imagnet"], "did you mean 'widelast_imagenet"),
        (["step", "--variants", "eager"], "--variants: expected some of eager_fp32, "),
        (["step", "--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N; got 'tpu'"),
    ],
)
def test_mistakes_get_one_clear_message(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
