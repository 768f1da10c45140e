"""A teacher's own image statistics, image size and grid, compared with timm's own transform."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from featkd.cache import LayerShape
from featkd.models.adapters import ImageAdapter, resize_map
from featkd.train.layer_pairs import resized_maps
from featkd.train.recipe import LossConfig, Recipe, RecipeError, TeacherConfig
from featkd.train.teacher_images import teacher_size
from featkd.train.trainer import Trainer
from tests.conftest import TEACHER
from tests.train.runs import CPU, NOTHING_DRAWN, changed, refuse, train_teacher, with_cache

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def still(recipe: Recipe) -> Recipe:
    """`recipe` without anything drawn: a sample's pixels are those of timm's evaluation."""
    return changed(recipe, data=dict(augment=NOTHING_DRAWN, crop_pct=1.0), loss=dict(feature="mse"))


@pytest.fixture
def of_half(still: Recipe, tmp_path: Path) -> Recipe:
    """A pretrained teacher with mean and std 0.5; timm reads a file in place of the download."""
    options = {**TEACHER, "num_classes": 3}
    torch.manual_seed(3)
    file = tmp_path / "pretrained.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=16, **options).state_dict(), file)
    record = {"file": str(file), "num_classes": 3, "mean": HALF, "std": HALF, "crop_pct": 1.0}
    options["pretrained_cfg_overlay"] = record
    teacher = TeacherConfig(name="vit_tiny_patch16_224", pretrained=True, options=options)
    return replace(still, teacher=teacher)


def timms_outputs(trainer: Trainer, batch, **cfg) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and last map of the teacher by timm alone: its transform of the files, its forward."""
    model = trainer.components.teacher_model
    config = timm.data.resolve_model_data_config(model) | cfg
    transform = timm.data.create_transform(**config, is_training=False)
    dataset = trainer.components.train_loader.dataset
    files = [Path(dataset.name(int(index))) for index in batch.source_index]
    root = Path(trainer.recipe.data.path)
    files = [file if file.exists() else root / "train" / file for file in files]
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        logits = model(images)
        (last,) = model.forward_intermediates(
            images, indices=[-1], output_fmt="NLC", intermediates_only=True
        )
    return logits, last


def test_a_pretrained_teacher_sees_images_in_its_own_statistics(of_half: Recipe) -> None:
    trainer = Trainer(of_half, CPU)
    batch = next(iter(trainer.batches(0)))
    logits, (last,) = trainer.components.teacher_outputs(batch)
    size = {"input_size": (3, 16, 16)}
    want_logits, want = timms_outputs(trainer, batch, **size)
    torch.testing.assert_close(logits, want_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, want, rtol=1e-5, atol=1e-5)
    wrong, _ = timms_outputs(trainer, batch, **size, mean=of_half.data.mean, std=of_half.data.std)
    assert not torch.allclose(logits, wrong, rtol=1e-2, atol=1e-2)
    (note,) = (x for x in trainer.components.notes if "normalised" in x)
    assert "mean [0.5, 0.5, 0.5]" in note
    assert "timm's record of vit_tiny_patch16_224" in note


def test_a_cache_holds_the_outputs_for_the_teachers_own_images(of_half: Recipe) -> None:
    cached = with_cache(of_half, Path(of_half.out) / "cache")
    outputs = []
    for each in (of_half, cached):
        trainer = Trainer(each, CPU)
        outputs.append(trainer.components.teacher_outputs(next(iter(trainer.batches(0)))))
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
    torch.testing.assert_close(outputs[1].maps[0], outputs[0].maps[0])
    message = r"cache: .* teacher.mean: \[0.5, 0.5, 0.5\], not \[0.4, 0.5, 0.5\]"
    refuse(cached, message, teacher=dict(mean=(0.4, 0.5, 0.5)))


def test_a_checkpoint_of_featkd_brings_its_statistics(still: Recipe) -> None:
    checkpoint = train_teacher(still, data=dict(mean=(0.3, 0.4, 0.5), std=HALF))
    still = changed(still, teacher=dict(checkpoint=checkpoint))
    trainer = Trainer(still, CPU)
    batch = next(iter(trainer.batches(0)))
    want, _ = timms_outputs(
        *(trainer, batch), input_size=(3, 16, 16), mean=(0.3, 0.4, 0.5), std=HALF, crop_pct=1.0
    )
    got = trainer.components.teacher_outputs(batch).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    own = Trainer(changed(still, teacher=dict(mean=still.data.mean, std=still.data.std)), CPU)
    assert torch.equal(
        own.components.teacher_outputs(batch).logits, own.components.teacher_model(batch.images)
    )


def test_a_file_that_does_not_say_its_statistics_is_noted(still: Recipe, tmp_path: Path) -> None:
    options = {**TEACHER, "num_classes": 3}
    model = timm.create_model("vit_base_patch16_siglip_224", img_size=16, **options)
    torch.save(model.state_dict(), tmp_path / "t.pth")
    teacher = TeacherConfig(
        "vit_base_patch16_siglip_224", checkpoint=str(tmp_path / "t.pth"), options=options
    )
    notes = Trainer(replace(still, teacher=teacher), CPU).components.notes
    assert any("t.pth does not say" in x and "[0.5, 0.5, 0.5]" in x for x in notes)
    said = replace(teacher, mean=HALF, std=HALF)
    notes = Trainer(replace(still, teacher=said), CPU).components.notes
    assert not any("does not say" in x for x in notes)
    assert any("normalised by mean [0.5, 0.5, 0.5]" in x and "the recipe" in x for x in notes)


@pytest.mark.parametrize(("size", "side"), [(None, 8), (12, 6), (32, 16)])
def test_a_map_on_another_grid_is_resized(still: Recipe, size: int | None, side: int) -> None:
    """Teacher patches of 2 pixels, student patches of 4: the student's grid is 4 x 4."""
    options = {**TEACHER, "patch_size": 2}
    recipe = changed(
        still, teacher=dict(img_size=size, options=options), loss=LossConfig(feature="spectral")
    )
    trainer = Trainer(recipe, CPU)
    batch = next(iter(trainer.batches(0)))
    (got,) = trainer.components.teacher_outputs(batch).maps
    images = batch.images
    if size is not None:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    model = trainer.components.teacher_model
    with torch.no_grad():
        (x,) = model.forward_intermediates(images, indices=[-1], intermediates_only=True)
    assert x.shape[2:] == (side, side)
    want = F.interpolate(x.double(), size=(4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(got.double(), want.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    notes = trainer.components.notes
    assert any(f"teacher's map of {side} x {side} tokens is resized to" in x for x in notes)
    assert trainer.step([batch]).total.isfinite()
    cached = Trainer(with_cache(recipe, Path(recipe.out) / "cache"), CPU)
    (again,) = cached.components.teacher_outputs(next(iter(cached.batches(0)))).maps
    torch.testing.assert_close(again, got)


@pytest.mark.parametrize(("size", "side"), [(196, 14), (224, 16)])
def test_dinov2_meets_a_student_of_patch_16(size: int, side: int) -> None:
    tokens = torch.randn(2, side * side, 8, generator=torch.Generator().manual_seed(0))
    own, its = LayerShape(1, 196, 4, "float32"), LayerShape(5, side * side, 8, "float32")
    notes: list[str] = []
    assert resized_maps([own], [its], notes) == (replace(its, tokens=196),)
    assert len(notes) == (side != 14)
    options = {"embed_dim": 12, "depth": 1, "num_heads": 1, "img_size": size}
    model = timm.create_model("vit_small_patch14_dinov2", **options)
    assert model.patch_embed.grid_size == (side, side)
    images = tokens.double().transpose(1, 2).reshape(2, 8, side, side)
    want = F.interpolate(images, size=(14, 14), mode="bilinear", antialias=True)
    got = resize_map(tokens, 14)
    torch.testing.assert_close(got.double(), want.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    half = resize_map(tokens.bfloat16(), 14)
    assert half.dtype == torch.bfloat16


def test_the_affine_map_is_exact() -> None:
    mean, std, new, new_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), HALF, (0.25, 0.5, 1.0)
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    column = [torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std, new, new_std)]
    images = ((pixels - column[0]) / column[1]).float()
    got = ImageAdapter(mean, std, new, new_std, 4, 4)(images)
    want = (pixels - column[2]) / column[3]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_grids_that_can_not_be_resized_are_refused() -> None:
    square, odd = LayerShape(1, 16, 4, "float32"), LayerShape(1, 15, 4, "float32")
    message = r"loss.pairs: layer pair \[1, 1\]: the teacher's map has 15 tokens"
    with pytest.raises(RecipeError, match=message):
        resized_maps([square], [odd], [])
    with pytest.raises(RecipeError, match="the student's map has 15 tokens"):
        resized_maps([odd], [square], [])
    assert resized_maps([odd], [odd], []) == (odd,)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (18, r"^teacher.img_size: 18 is not a multiple of the patch size 4 .* 16 or 20$"),
        (3, r"^teacher.img_size: 3 .*; expected for example 4 or 8$"),
    ],
)
def test_sizes_that_patches_do_not_divide_are_refused(
    still: Recipe, size: int, message: str
) -> None:
    refuse(still, message, teacher=dict(img_size=size))
    refuse(still, r"^data.img_size: 18 is not a multiple of the patch", data=dict(img_size=18))


def test_one_statistic_alone_is_refused(still: Recipe, tmp_path: Path) -> None:
    """The other is unknown for a file that is no checkpoint of featkd."""
    options = {**TEACHER, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, **options)
    torch.save(model.state_dict(), tmp_path / "t.pth")
    file = str(tmp_path / "t.pth")
    teacher = TeacherConfig("vit_tiny_patch16_224", checkpoint=file, mean=HALF, options=options)
    refuse(still, r"^teacher.std: null, but teacher.mean is given", teacher=teacher)


def test_a_pair_as_image_size_of_the_options(still: Recipe) -> None:
    square = replace(still.teacher, options={**TEACHER, "img_size": [32, 32]})
    assert teacher_size(replace(still, teacher=square)) == 32
    wide = replace(still, teacher=replace(square, options={**TEACHER, "img_size": [32, 16]}))
    refuse(wide, r"^teacher.options.img_size: .* got \[32, 16\]")


def test_unused_logits_of_a_cache_may_have_other_classes(still: Recipe) -> None:
    teacher = replace(still.teacher, options={**TEACHER, "num_classes": 7})
    recipe = replace(still, teacher=teacher, loss=LossConfig(feature="mse"))
    cached = with_cache(recipe, Path(recipe.out) / "cache")
    trainer = Trainer(cached, CPU)
    assert trainer.step([next(iter(trainer.batches(0)))]).total.isfinite()
    wrong = replace(teacher, name="vit_tiny_patch16_224.bad", pretrained=True)
    refuse(cached, r"^teacher.name: timm has no weights", ValueError, teacher=wrong)


def test_a_student_that_drops_patches_is_refused(still: Recipe) -> None:
    options = {**still.student.options, "patch_drop_rate": 0.5}
    student = dict(arch="plain", options=options)
    refuse(still, r"^student.options.patch_drop_rate: 0.5, which leaves", student=student)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"random": True}}, r"teacher.options.random: True: this is a field"),
        ({"options": None}, r"teacher.options: expected fields and values, got None"),
        ({"mean": (0.5, 0.5)}, r"teacher.mean: expected null or three finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, r"teacher.std: expected numbers > 0"),
        ({"img_size": 0}, r"teacher.img_size: expected a finite number > 0, got 0"),
        ({"img_size": 8, "options": {"img_size": 16}}, r"teacher.img_size: 8, but .* is 16"),
    ],
)
def test_unusable_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TeacherConfig(**fields)


def test_a_convolutional_teacher_of_any_size(still: Recipe) -> None:
    """`img_size` is not passed to a model that does not take it."""
    teacher = TeacherConfig("resnet18", random=True, img_size=32)
    recipe = changed(
        still,
        student=dict(arch="lift", teacher_dim=128),
        teacher=teacher,
        loss=LossConfig(alpha=0.5, feature="mse", pairs=[(-1, 2)]),
    )
    trainer = Trainer(recipe, CPU)
    (x,) = trainer.components.teacher_outputs(batch := next(iter(trainer.batches(0)))).maps
    assert x.shape == (8, 16, 128)
    assert trainer.step([batch]).total.isfinite()
