"""Runs on a cache: their losses against runs with the teacher, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nvidia.dali
import pytest
import torch

from featkd.cache import CacheError, TeacherCache
from featkd.cli.main import main
from featkd.data import SampleKey, build_loader
from featkd.runtime.distributed import ProcessContext
from featkd.train import cached_teacher
from featkd.train.components import build
from featkd.train.dryrun import dry_run
from featkd.train.logs import read_csv
from featkd.train.recipe import PooledConfig, Recipe, RecipeError
from featkd.train.recipe_file import load_recipe
from featkd.train.trainer import Trainer
from tests.test_ranks import succeed
from tests.train.runs import (
    CPU,
    NOTHING_DRAWN,
    changed,
    check_losses_close,
    column,
    copy_images,
    interrupt,
    refuse,
    run,
    same_weights,
    train_teacher,
    with_cache,
)


@pytest.mark.parametrize(
    ("arch", "repeats", "amp"),
    [("widelast", 1, "off"), ("lift", 3, "off"), ("widelast", 1, "bf16")],
)
def test_an_exact_cache_gives_the_losses_and_weights_bit_for_bit(
    recipe, tmp_path, arch, repeats, amp
):
    recipe = changed(
        recipe,
        amp=amp,
        student=dict(arch=arch),
        data=dict(augment=dict(repeats=repeats)),
        loss=dict(pairs=[(-1, -1)] if arch == "lift" else [(0, -1), (1, 0)]),
    )
    cached = with_cache(recipe, tmp_path / "cache")
    run(recipe)
    trainer = Trainer(cached, CPU)
    assert trainer.components.teacher_model is None
    trainer.run(quiet=True)
    assert len(column(recipe, "loss")) == 12
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


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_loss_takes_the_product_of_the_stored_factors(recipe, tmp_path, amp):
    """Maps have the dtype of the teacher's maps, which is float32 in a ViT under amp too."""
    recipe = replace(recipe, amp=amp)
    cached = Trainer(with_cache(recipe, tmp_path / "cache", features="lowrank", store="int8"), CPU)
    cache = TeacherCache(tmp_path / "cache")
    batch = next(cached.batches(0))
    read = cached.teacher_forward(batch)
    maps = []
    for key in batch.keys:
        shard, offset = cache._place(SampleKey(*key.tolist()))
        row = shard.row(offset)
        left, right = (
            row[f"features.1.{part}"].reshape(size, -1).double() * row[f"features.1.{part}_scales"]
            for part, size in (("left", 16), ("right", 24))
        )
        maps.append(left @ right.mT)
    assert read.maps[0].dtype == Trainer(recipe, CPU).teacher_forward(batch).maps[0].dtype
    want = read._replace(maps=[torch.stack(maps).float()])
    student = cached.student_forward(batch.images, read)
    found, expected = (
        cached.compute_loss(student, batch.targets, x).features for x in (read, want)
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


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
    recipe = changed(
        recipe,
        student=dict(arch="plain"),
        loss=dict(projector="linear", pooled=PooledConfig(metric="mse")),
        amp=amp,
    )
    cached = Trainer(with_cache(recipe, tmp_path / "cache", **options), CPU)
    plain = Trainer(recipe, CPU)
    for batch, same in zip(plain.batches(0), cached.batches(0), strict=True):
        want, found = plain.step([batch]), cached.step([same])
        if not options:
            assert found == want
        if plain.update == 1:  # later ones depend on the maps
            assert torch.equal(found.pooled, want.pooled)


def test_a_cache_of_pooled_features_alone(recipe, tmp_path, capsys):
    pooled = changed(recipe, loss=dict(feature=None, pooled=PooledConfig()))
    cached = with_cache(pooled, tmp_path / "cache", features=None, store=None)
    run(pooled)
    run(cached)
    for name in ("loss", "pooled_loss"):
        assert column(cached, name) == column(pooled, name)
    assert main(["cache", "--verify", str(tmp_path / "cache")]) == 0
    without = with_cache(recipe, tmp_path / "without")
    needed = r"\(loss.pairs, loss.pooled\) needs \['pooled'\] too"
    refuse(pooled, rf"holds the maps of layers \[1\] .* {needed}", cache=without.cache)
    refuse(recipe, r"layers \['pooled'\] .* needs \[1\] too", cache=cached.cache)


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
    succeed(server.ranks(2, *words, "--cache", folder))
    check_losses_close(tmp_path / "one", tmp_path / "two", "logits_loss")
    assert len(read_csv(tmp_path / "two" / "metrics.csv")) == 6


def test_a_cached_run_resumes_within_an_epoch(recipe, tmp_path):
    """Under cache_epochs: cycle, in the second epoch on the only view."""
    recipe = changed(recipe, checkpoint=dict(every_updates=4))
    cached = with_cache(recipe, tmp_path / "cache", views=1)
    whole = replace(cached, cache_epochs="cycle", out=str(tmp_path / "whole"))
    run(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))
    interrupt(Trainer(broken, CPU), 9)
    run(broken)
    assert column(broken, "loss") == column(whole, "loss")
    assert same_weights(Path(broken.out) / "last.pt", Path(whole.out) / "last.pt")


def test_cycled_epochs_have_the_pixels_of_a_view_in_another_order(recipe):
    """With repeats, in the order of the view: another order would have other images."""

    def keys(repeats: int, views: int | None, epoch: int) -> list[tuple[int, ...]]:
        data = changed(recipe.data, augment=dict(repeats=repeats))
        loader = build_loader(data, split="train", batch_size=8, views=views)
        loader.set_epoch(epoch)
        return [tuple(key) for key in loader.sampler]

    assert keys(1, 2, 1) == keys(1, None, 1)
    third, first = keys(1, 2, 2), keys(1, None, 0)
    assert third != first
    assert sorted(third) == sorted(first)
    assert [image for _, image, _ in third] == [image for _, image, _ in keys(1, None, 2)]
    assert keys(3, 2, 2) == keys(3, None, 0)


def test_more_epochs_than_views_need_a_policy(recipe, tmp_path):
    cached = with_cache(recipe, tmp_path / "cache", views=1)
    refuse(cached, r"optim.epochs is 2, but .* 1 views; .*cycle")


def test_a_run_needs_only_its_own_views(recipe, tmp_path):
    """The first epochs need the first views; cycled epochs need all."""
    cached = with_cache(recipe, tmp_path / "cache", views=3)
    (tmp_path / "cache" / "view-00002" / "shard-00001.safetensors").unlink()
    assert Trainer(cached, CPU).run(quiet=True).updates == 12
    for epochs, policy in ((3, "error"), (4, "cycle")):
        longer = changed(cached, optim=dict(epochs=epochs), cache_epochs=policy, out="nowhere")
        refuse(longer, r"1 of the 9 shards .* view-00002/shard-00001", CacheError)


def test_an_epoch_in_another_order_is_refused(recipe, tmp_path):
    """Within an epoch, from a run without views to one that repeats the order of view 0."""
    recipe = changed(recipe, data=dict(augment=dict(repeats=3)))
    cached = replace(with_cache(recipe, tmp_path / "cache", views=1), cache_epochs="cycle")
    plain, other = (Trainer(x, CPU).components.train_loader for x in (recipe, cached))
    plain.set_epoch(0, 1)
    other.load_state_dict(plain.state_dict())
    plain.set_epoch(1, 1)
    with pytest.raises(ValueError, match="shuffle_epoch: 1 when"):
        other.load_state_dict(plain.state_dict())


def test_a_cache_of_something_else_is_refused_by_every_field(recipe, tmp_path, monkeypatch):
    checkpoint = Path(train_teacher(recipe))
    recipe = changed(recipe, teacher=dict(checkpoint=str(checkpoint)))
    cached = with_cache(recipe, tmp_path / "cache")

    def refused(recipe: Recipe, message: str, **fields: Any) -> None:
        refuse(recipe, f"does not fit this run .*: {message}", **fields)

    refused(cached, "seed: 0, not 5$", seed=5)
    refused(cached, "amp: 'off', not 'bf16'$", amp="bf16")
    refused(cached, "amp: 'off', not 'bf16'; seed: 0, not 5$", seed=5, amp="bf16")  # all at once
    for field, value, message in (
        ("name", "deit_tiny_patch16_224", "name: 'vit_tiny_patch16_224', not 'deit_tiny_.*'$"),
        ("options", {**cached.teacher.options, "depth": 3}, "options: .*: 2.*, not .*'depth': 3"),
        ("weights", "model", "weights: 'auto'"),
        (
            *("checkpoint", None),
            "checkpoint: '[0-9a-f]{64}', not None; teacher.weights: 'auto', not None$",
        ),
    ):
        refused(cached, f"teacher.{message}", teacher={field: value})
    for field, value in (
        ("img_size", 32), ("mean", (0.5, 0.5, 0.5)), ("std", (1.0, 1.0, 1.0)),
        ("interpolation", "bilinear"),
    ):  # fmt: skip
        refused(cached, f"data.{field}: .*, not ", data={field: value})
    for field, value in (
        ("scale", (0.5, 1.0)), ("ratio", (1.0, 1.0)), ("hflip", 0.0), ("rand_augment", None),
        ("random_erasing", 0.0), ("repeats", 2),
    ):  # fmt: skip
        refused(cached, f"data.augment.{field}: .*, not ", data={"augment": {field: value}})

    elsewhere, red = copy_images(cached, tmp_path / "images"), tmp_path / "images" / "train" / "red"
    Trainer(elsewhere, CPU)
    content = (red / "1.png").read_bytes()
    (red / "1.png").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # same name and size
    refused(elsewhere, "data.images_sha256: ")
    (red / "1.png").write_bytes(content)
    Trainer(elsewhere, CPU)
    (red / "0.png").rename(red / "x.png")
    refused(elsewhere, "data.images_sha256: ")
    (red / "x.png").unlink()
    refused(elsewhere, "data.images: 48, not 47; .*data.images_sha256: ")

    with monkeypatch.context() as patch:
        patch.setattr("featkd.train.cached_teacher.AUGMENTATION_VERSION", 3)
        refused(cached, r"augmentation_version: 2, not 3 \(.*expected a cache that it has made\)$")
    with monkeypatch.context() as patch:
        patch.setattr("featkd.train.cached_teacher.metadata.version", lambda name: f"0.{len(name)}")
        for name in ("torch", "numpy", "timm", "torchvision", "pillow"):
            refused(cached, rf".*versions.{name}: '.*', not '0.{len(name)}'")

    named = dict(checkpoint=str(checkpoint.rename(tmp_path / "renamed.pt")))
    Trainer(changed(cached, teacher=named), CPU)  # the content is compared
    with_cache(changed(recipe, teacher=named), tmp_path / "cache")
    (tmp_path / "renamed.pt").rename(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes() + b"\0")
    refused(cached, "teacher.checkpoint: '[0-9a-f]{64}', not ")
    checkpoint.unlink()
    notes = Trainer(cached, CPU).components.notes
    assert any(note.startswith("cache: no file ") and "by file name only" in note for note in notes)
    mistyped = dict(checkpoint=f"{checkpoint.parent}/lst.pt")
    refuse(cached, r"no file .*lst\.pt', and .* was made from last\.pt", teacher=mistyped)


def test_a_missing_checkpoint_does_not_fit_a_cache_without_one(recipe, tmp_path):
    cached = with_cache(recipe, tmp_path / "cache")
    missing = dict(checkpoint=str(tmp_path / "last.pt"))
    refuse(cached, r"no file .*last\.pt', .* made from no checkpoint", teacher=missing)


def test_a_cache_of_earlier_draws_fits_only_where_nothing_is_drawn(recipe, tmp_path, monkeypatch):
    """Version 1 drew the augmentation otherwise, and pixels without augmentation alike."""
    caches = []
    for name, augment in (("drawn", recipe.data.augment), ("fixed", NOTHING_DRAWN)):
        one = changed(recipe, data=dict(augment=augment))
        with monkeypatch.context() as patch:
            patch.setattr("featkd.train.cached_teacher.AUGMENTATION_VERSION", 1)
            caches.append(with_cache(one, tmp_path / name, views=1))
    drawn, fixed = (replace(cached, cache_epochs="cycle") for cached in caches)
    explained = r"augmentation_version: 1, not 2 \(this version of featkd draws other crops"
    refuse(drawn, rf"{drawn.cache} does not fit this run .*{explained}")
    with pytest.raises(CacheError, match=rf"holds another cache: .*{explained}"):
        with_cache(replace(drawn, cache=None), tmp_path / "drawn")
    Trainer(fixed, CPU)
    for change in (
        {"scale": (0.5, 1)}, {"ratio": (1, 2)}, {"hflip": 0.5}, {"random_erasing": 0.1},
        {"color_jitter": 0.1}, {"rand_augment": "rand-m9"},
    ):  # fmt: skip
        assert replace(NOTHING_DRAWN, **change).is_random
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
    message = r"maps of layers \[1\] of the teacher's 2, .* needs \[0\]"
    refuse(cached, message, loss=dict(pairs=[(-1, 0)]))
    message = "student.teacher_dim: 48, but the teacher's layer 1 has 24"
    refuse(cached, message, student=dict(teacher_dim=48))
    alone = changed(cached, loss=dict(feature=None))
    assert Trainer(alone, CPU).components.teacher.shapes.maps == ()
    with_none = dict(loss=dict(alpha=0, feature=None), teacher=None)
    refuse(cached, r"cache: .* teacher is null", **with_none)
    refuse(cached, "cache: expected a folder on this machine", cache="s3://bucket/cache")
    refuse(cached, "nowhere: not a featkd cache", CacheError, cache=str(tmp_path / "nowhere"))


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
    odd, red = copy_images(recipe, tmp_path / "images"), tmp_path / "images" / "train" / "red"
    shutil.copy(red / "0.png", red / "more.png")
    cached = with_cache(replace(odd, batch_size=5), tmp_path / "cache")
    monkeypatch.setattr(ProcessContext, "broadcast", lambda _, value: value)
    message = r"batch_size: 5 on 2 processes takes 50 .* 1 of them twice"
    with pytest.raises(RecipeError, match=message):
        build(cached, ProcessContext(0, 2, CPU.device))


@pytest.mark.parametrize(
    ("top", "tau", "noted"), [(1, 2.0, True), (1, 1.0, False), ("all", 2.0, False)]
)
def test_a_temperature_with_few_stored_logits_is_noted(recipe, tmp_path, top, tau, noted):
    recipe = changed(recipe, loss=dict(tau=tau))
    cached = with_cache(recipe, tmp_path / "cache", logits_top=top)
    notes = build(cached, CPU).notes
    assert any("keeps 1 of 3 classes" in note and "loss.tau 2" in note for note in notes) == noted
