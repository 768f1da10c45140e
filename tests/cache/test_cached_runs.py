"""Runs on a cache: their losses against runs with the teacher, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nvidia.dali
import pytest
import torch

from featkd.cache import CacheConfig, CacheError
from featkd.cli.main import main
from featkd.runtime.distributed import ProcessContext
from featkd.train import cached_teacher
from featkd.train.build_cache import build_cache
from featkd.train.components import build
from featkd.train.dryrun import dry_run
from featkd.train.logs import read_csv
from featkd.train.recipe import PooledConfig, Recipe, RecipeError
from featkd.train.recipe_file import load_recipe
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, EXACT, NOTHING_DRAWN, column, run, same_weights, with_cache


def refused(recipe: Recipe, message: str, error: type[Exception] = RecipeError) -> None:
    with pytest.raises(error, match=message):
        Trainer(recipe, CPU)


def losses(recipe: Recipe, name: str = "loss") -> list[float]:
    return list(map(float, column(recipe, name)))


@pytest.mark.parametrize(
    ("arch", "repeats", "amp"),
    [("widelast", 1, "off"), ("lift", 3, "off"), ("widelast", 1, "bf16")],
)
def test_an_exact_cache_gives_the_losses_and_weights_bit_for_bit(
    recipe, tmp_path, arch, repeats, amp
):
    augment = replace(recipe.data.augment, repeats=repeats)
    recipe = replace(
        recipe,
        amp=amp,
        student=replace(recipe.student, arch=arch),
        data=replace(recipe.data, augment=augment),
        loss=replace(recipe.loss, pairs=[(-1, -1)] if arch == "lift" else [(0, -1), (1, 0)]),
    )
    cached = with_cache(recipe, tmp_path / "cache")
    run(recipe)
    trainer = Trainer(cached, CPU)
    assert trainer.components.teacher_model is None
    trainer.run(quiet=True)
    assert len(losses(recipe)) == 12
    for name in ("loss", "logits_loss", "feature_loss"):
        assert column(cached, name) == column(recipe, name)
    assert same_weights(Path(cached.out) / "last.pt", Path(recipe.out) / "last.pt")


@pytest.mark.parametrize(
    ("options", "logits", "features"),
    [
        ({"store": "int8"}, 0, 5e-3),
        ({"store": "fp16"}, 0, 2**-11),
        ({"store": "bf16"}, 0, 2**-8),
        ({"logits_top": 2}, 2**-11, 0),  # of 3: the third has the rest
        ({"logits_top": 1}, 5e-3, 0),
        ({"features": "lowrank", "store": "fp16", "energy": 0.999}, 0, 2e-3),
        ({"features": "lowrank", "store": "int8", "rank": 16}, 0, 2e-2),
    ],
)
def test_compressed_forms_are_within_their_error(recipe, tmp_path, options, logits, features):
    """Losses at the initial weights; differences would grow with training."""
    cached = Trainer(with_cache(recipe, tmp_path / "cache", **options), CPU)
    plain = Trainer(recipe, CPU)
    for trainer in (plain, cached):
        trainer.components.student.eval()
    errors = []
    for batch, same in zip(
        plain.components.train_loader, cached.components.train_loader, strict=True
    ):
        want, found = plain.losses(batch), cached.losses(same)
        pairs = ((found.logits, want.logits), (found.features, want.features))
        errors.append([abs(x.item() / y.item() - 1) for x, y in pairs])
    for error, allowed in zip(map(max, zip(*errors, strict=True)), (logits, features), strict=True):
        assert allowed / 1000 <= error <= allowed + 1e-6


@pytest.mark.parametrize(
    ("options", "amp"),
    [
        ({}, "off"),
        ({"store": "int8"}, "bf16"),
        ({"features": "lowrank", "store": "fp16", "rank": 4}, "bf16"),
    ],
)
def test_pooled_features_are_stored_whole(recipe, tmp_path, options, amp):
    """Whatever the form of the maps, and with a projector for these."""
    student = replace(recipe.student, arch="plain")
    loss = replace(recipe.loss, projector="linear", pooled=PooledConfig(metric="mse"))
    recipe = replace(recipe, student=student, loss=loss, amp=amp)
    cached = Trainer(with_cache(recipe, tmp_path / "cache", **options), CPU)
    plain = Trainer(recipe, CPU)
    for batch, same in zip(plain.batches(0), cached.batches(0), strict=True):
        want, found = plain.step([batch]), cached.step([same])
        if not options:
            assert found == want
        if plain.update == 1:  # later ones depend on the maps
            assert torch.equal(found.pooled, want.pooled)


def test_a_cache_of_pooled_features_alone(recipe, tmp_path, capsys):
    loss = replace(recipe.loss, feature=None, pooled=PooledConfig())
    pooled = replace(recipe, loss=loss)
    cached = with_cache(pooled, tmp_path / "cache", features=None, store=None)
    run(pooled)
    run(cached)
    for name in ("loss", "pooled_loss"):
        assert column(cached, name) == column(pooled, name)
    assert main(["cache", "--verify", str(tmp_path / "cache")]) == 0
    without = with_cache(recipe, tmp_path / "without")
    message = (
        r"holds the maps of layers \[1\] .* \(loss.pairs, loss.pooled\) needs \['pooled'\] too"
    )
    refused(replace(pooled, cache=without.cache), message)
    refused(replace(recipe, cache=cached.cache), r"layers \['pooled'\] .* needs \[1\] too")


def test_a_cached_run_on_two_processes_has_the_losses_of_the_teachers(
    recipe_file, server, tmp_path
):
    """On gloo, against one process with the same global batch, with which the cache was made."""
    folder, same = tmp_path / "cache", ("--student.options.drop_path_rate", 0)
    words = ["cache", recipe_file, "--out", folder, "--batch_size", 16, "--views", 2]
    words += ["--logits-top", "all", "--store", "fp32", *same]
    assert main(list(map(str, words))) == 0
    words = ["distill", recipe_file, "--out", tmp_path / "one", "--batch_size", 16, *same]
    assert main(list(map(str, words))) == 0
    words = ["distill", recipe_file, "--out", tmp_path / "two", "--batch_size", 8, *same]
    for rank in server.ranks(2, *words, "--cache", folder):
        assert rank.wait() == 0, rank.stderr
    one, two = (read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for x, y in zip(one, two, strict=True):
        for name in ("loss", "logits_loss", "feature_loss"):
            assert float(y[name]) == pytest.approx(float(x[name]), rel=1e-5)


def test_a_cached_run_resumes_within_an_epoch(recipe, tmp_path):
    """Under cache_epochs: cycle, in the second epoch on the only view."""
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_updates=4))
    cached = with_cache(recipe, tmp_path / "cache", views=1)
    whole = replace(cached, cache_epochs="cycle", out=str(tmp_path / "whole"))
    run(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))
    trainer = Trainer(broken, CPU)
    step, left = trainer.step, iter(range(9))

    def stop(batches):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(batches)

    trainer.step = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run(quiet=True)
    run(broken)
    assert column(broken, "loss") == column(whole, "loss")
    assert same_weights(Path(broken.out) / "last.pt", Path(whole.out) / "last.pt")


def test_more_epochs_than_views_need_a_policy(recipe, tmp_path):
    cached = with_cache(recipe, tmp_path / "cache", views=1)
    refused(cached, r"optim.epochs is 2, but .* 1 views; .*cycle")


def test_a_run_needs_only_its_own_views(recipe, tmp_path):
    """The first epochs need the first views; cycled epochs need all."""
    cached = with_cache(recipe, tmp_path / "cache", views=3)
    (tmp_path / "cache" / "view-00002" / "shard-00001.safetensors").unlink()
    assert Trainer(cached, CPU).run(quiet=True).updates == 12
    for epochs, policy in ((3, "error"), (4, "cycle")):
        longer = replace(
            cached, optim=replace(cached.optim, epochs=epochs), cache_epochs=policy, out="nowhere"
        )
        refused(longer, r"1 of the 9 shards .* view-00002/shard-00001", CacheError)


def test_a_cache_of_something_else_is_refused_by_every_field(recipe, images, tmp_path, monkeypatch):
    checkpoint = tmp_path / "teacher" / "last.pt"
    run(
        replace(
            recipe,
            out=str(checkpoint.parent),
            teacher=None,
            student=replace(recipe.student, arch="plain", options=recipe.teacher.options),
            loss=replace(recipe.loss, alpha=0, feature=None),
            optim=replace(recipe.optim, epochs=1, warmup_epochs=0),
        )
    )
    recipe = replace(recipe, teacher=replace(recipe.teacher, checkpoint=str(checkpoint)))
    cached = with_cache(recipe, tmp_path / "cache")

    def unfit(other: Recipe, message: str) -> None:
        refused(other, f"does not fit this run .*: {message}")

    teacher, data, augment = cached.teacher, cached.data, cached.data.augment
    unfit(replace(cached, seed=5), "seed: 0, not 5$")
    unfit(replace(cached, amp="bf16"), "amp: 'off', not 'bf16'$")
    name, depth = "deit_tiny_patch16_224", {"options": {**teacher.options, "depth": 3}}
    for change, message in (
        ({"name": name}, f"name: 'vit_tiny_patch16_224', not '{name}'$"),
        (depth, "options: .*'depth': 2.*, not .*'depth': 3"),
        ({"weights": "model"}, "weights: 'auto'"),
        ({"checkpoint": None}, "checkpoint: '[0-9a-f]{64}', not None; .*: 'auto', not None$"),
    ):
        unfit(replace(cached, teacher=replace(teacher, **change)), f"teacher.{message}")
    pixels = {"img_size": 32, "mean": (0.5,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}
    for field, value in pixels.items():
        unfit(replace(cached, data=replace(data, **{field: value})), f"data.{field}: .*, not ")
    drawn = {"scale": (0.5, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "rand_augment": None}
    for field, value in {**drawn, "random_erasing": 0.0, "repeats": 2}.items():
        other = replace(data, augment=replace(augment, **{field: value}))
        unfit(replace(cached, data=other), f"data.augment.{field}: .*, not ")
    both = replace(cached, seed=5, amp="bf16")
    unfit(both, "amp: 'off', not 'bf16'; seed: 0, not 5$")

    moved = tmp_path / "images"
    shutil.copytree(images, moved)
    elsewhere = replace(cached, data=replace(data, path=str(moved)))
    Trainer(elsewhere, CPU)
    one = moved / "train" / "red" / "1.png"
    content = one.read_bytes()
    one.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # same name and size
    unfit(elsewhere, "data.images_sha256: ")
    one.write_bytes(content)
    Trainer(elsewhere, CPU)
    (moved / "train" / "red" / "0.png").rename(moved / "train" / "red" / "x.png")
    unfit(elsewhere, "data.images_sha256: ")
    (moved / "train" / "red" / "x.png").unlink()
    unfit(elsewhere, "data.images: 48, not 47; .*data.images_sha256: ")

    with monkeypatch.context() as patch:
        patch.setattr("featkd.train.cached_teacher.AUGMENTATION_VERSION", 3)
        unfit(cached, r"augmentation_version: 2, not 3 \(.*expected a cache that it has made\)$")
    with monkeypatch.context() as patch:
        patch.setattr("featkd.train.cached_teacher.metadata.version", lambda name: f"0.{len(name)}")
        for name in ("torch", "numpy", "timm", "torchvision", "pillow"):
            unfit(cached, rf".*versions.{name}: '.*', not '0.{len(name)}'")

    named = replace(teacher, checkpoint=str(checkpoint.rename(tmp_path / "renamed.pt")))
    Trainer(replace(cached, teacher=named), CPU)  # the content is compared
    build_cache(
        replace(recipe, teacher=named), CacheConfig(**EXACT), CPU, tmp_path / "cache", quiet=True
    )
    (tmp_path / "renamed.pt").rename(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes() + b"\0")
    unfit(cached, "teacher.checkpoint: '[0-9a-f]{64}', not ")
    checkpoint.unlink()
    notes = Trainer(cached, CPU).components.notes
    assert any(note.startswith("cache: no file ") and "by file name only" in note for note in notes)
    mistyped = replace(cached, teacher=replace(teacher, checkpoint=f"{checkpoint.parent}/lst.pt"))
    refused(mistyped, r"no file .*lst\.pt', and .* was made from last\.pt")


def test_a_missing_checkpoint_does_not_fit_a_cache_without_one(recipe, tmp_path):
    cached = with_cache(recipe, tmp_path / "cache")
    missing = replace(cached.teacher, checkpoint=str(tmp_path / "last.pt"))
    refused(replace(cached, teacher=missing), r"no file .*last\.pt', .* made from no checkpoint")


def test_a_cache_of_earlier_draws_fits_only_where_nothing_is_drawn(recipe, tmp_path, monkeypatch):
    """Version 1 drew the augmentation otherwise, and pixels without augmentation alike."""
    caches = []
    for name, augment in (("drawn", recipe.data.augment), ("fixed", NOTHING_DRAWN)):
        one = replace(recipe, data=replace(recipe.data, augment=augment))
        with monkeypatch.context() as patch:
            patch.setattr("featkd.train.cached_teacher.AUGMENTATION_VERSION", 1)
            caches.append(with_cache(one, tmp_path / name, views=1))
    drawn, fixed = (replace(cached, cache_epochs="cycle") for cached in caches)
    explained = r"augmentation_version: 1, not 2 \(this version of featkd draws other crops"
    refused(drawn, rf"{drawn.cache} does not fit this run .*{explained}")
    with pytest.raises(CacheError, match=rf"holds another cache: .*{explained}"):
        with_cache(replace(drawn, cache=None), tmp_path / "drawn")
    Trainer(fixed, CPU).components.close()
    drawn = {"scale": (0.5, 1), "ratio": (1, 2), "hflip": 0.5, "random_erasing": 0.1}
    for field, value in {**drawn, "color_jitter": 0.1, "rand_augment": "rand-m9"}.items():
        assert replace(NOTHING_DRAWN, **{field: value}).is_random
    assert not NOTHING_DRAWN.is_random


def test_versions_of_everything_that_determines_the_pixels(monkeypatch):
    """DALI's version is not read from the metadata: its wheels have several names."""
    asked = []
    monkeypatch.setattr(
        "featkd.train.cached_teacher.metadata.version",
        lambda name: (asked.append(name), "1.2+cu1")[1],
    )
    always = dict.fromkeys(("torch", "numpy", "timm", "torchvision", "pillow"), "1.2")
    assert cached_teacher._versions("timm") == always
    assert cached_teacher._versions("dali, CPU") == {**always, "dali": nvidia.dali.__version__}
    assert not [name for name in asked if "dali" in name]


def test_a_cache_without_the_needed_layers_is_refused(recipe, tmp_path):
    cached = with_cache(recipe, tmp_path / "cache")
    other = replace(cached, loss=replace(cached.loss, pairs=[(-1, 0)]))
    refused(other, r"maps of layers \[1\] of the teacher's 2, .* needs \[0\]")
    wrong = replace(cached, student=replace(cached.student, teacher_dim=48))
    refused(wrong, r"student.teacher_dim: 48, but the teacher's layer 1 has 24")
    alone = replace(cached, loss=replace(cached.loss, feature=None), teacher=cached.teacher)
    assert Trainer(alone, CPU).components.teacher.shapes.maps == ()
    with pytest.raises(RecipeError, match=r"cache: .* teacher is null"):
        replace(cached, loss=replace(cached.loss, alpha=0, feature=None), teacher=None)
    with pytest.raises(RecipeError, match="cache: expected a folder on this machine"):
        replace(cached, cache="s3://bucket/cache")
    refused(
        replace(cached, cache=str(tmp_path / "nowhere")),
        "nowhere: no such folder; expected one",
        CacheError,
    )


def test_the_command_line_and_the_dry_run(recipe_file, tmp_path, capsys):
    out, folder = str(tmp_path / "run"), str(tmp_path / "cache")
    words = ["cache", str(recipe_file), "--out", folder, "--views", "2", "--shard-rows", "16"]
    assert main(words) == 0
    distill = ["distill", str(recipe_file), "--cache", folder, "--out", out]
    assert main([*distill, "--optim.epochs", "1", "--optim.warmup_epochs", "0"]) == 0
    report = dry_run(replace(load_recipe(recipe_file), cache=folder), CPU)
    assert f"rows of {folder}" in report
    shard = tmp_path / "cache" / "view-00001" / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 16
    shard.write_bytes(content)
    capsys.readouterr()
    assert main([*distill, "--resume", "force"]) == 1  # its warm-up differs
    assert f"featkd: {shard}: damaged" in capsys.readouterr().err


def test_a_batch_past_the_end_of_a_view_is_refused(recipe, tmp_path, monkeypatch):
    """49 images on two processes: each takes 25, one image twice."""
    images = tmp_path / "images"
    shutil.copytree(recipe.data.path, images)
    shutil.copy(images / "train" / "red" / "0.png", images / "train" / "red" / "more.png")
    odd = replace(recipe, data=replace(recipe.data, path=str(images)), batch_size=5)
    cached = with_cache(odd, tmp_path / "cache")
    monkeypatch.setattr(ProcessContext, "broadcast", lambda _, value: value)
    with pytest.raises(
        RecipeError, match=r"batch_size: 5 on 2 processes takes 50 .* 1 of them twice"
    ):
        build(cached, ProcessContext(0, 2, CPU.device))


@pytest.mark.parametrize(
    ("top", "tau", "noted"), [(1, 2.0, True), (1, 1.0, False), ("all", 2.0, False)]
)
def test_a_temperature_with_few_stored_logits_is_noted(recipe, tmp_path, top, tau, noted):
    recipe = replace(recipe, loss=replace(recipe.loss, tau=tau))
    cached = with_cache(recipe, tmp_path / "cache", logits_top=top)
    notes = build(cached, CPU).notes
    assert any("keeps 1 of 3 classes" in note and "loss.tau 2" in note for note in notes) == noted
