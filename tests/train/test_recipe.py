"""Recipes: published values, round trips, errors, and files of earlier versions."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest

from featkd.train.recipe import Recipe, RecipeError, StudentConfig, TeacherConfig, to_dict, to_yaml
from featkd.train.recipe_file import find_recipe, load_recipe, shipped_recipes

# [EM26] by way of design/method.md section 4: arch, alpha, feature loss
PUBLISHED = {
    "lift_imagenet_softkd_spectral": ("lift", 0.9, "spectral"),
    "lift_imagenet_mse": ("lift", 0.0, "mse"),
    "widelast_imagenet_softkd_mse": ("widelast", 0.9, "mse"),
    "widelast_imagenet_spectral": ("widelast", 0.0, "spectral"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    recipe = load_recipe(find_recipe(name))
    loss, optim, data = recipe.loss, recipe.optim, recipe.data
    assert (recipe.student.arch, loss.alpha, loss.feature) == PUBLISHED[name]
    assert (recipe.student.base, recipe.student.teacher_dim) == ("deit_tiny_patch16_224", 384)
    assert recipe.student.num_classes == 1000
    assert recipe.student.options == {}  # drop 0, drop-path 0
    assert recipe.teacher is not None
    assert (recipe.teacher.name, recipe.teacher.pretrained) == ("cait_s24_224", True)
    assert (loss.w_feat, loss.beta, loss.tau, loss.label_smoothing) == (0.2, 1, 1, 0.1)
    assert loss.pairs == [(11, 23)]
    assert (optim.optimizer, optim.weight_decay, optim.eps) == ("adamw", 0.05, 1e-8)
    assert (optim.lr, optim.lr_batch, recipe.batch_size) == (5e-4, 512, 512)
    assert (optim.clip_grad, optim.accumulate) == (None, 1)
    assert (optim.epochs, optim.warmup_epochs) == (300, 5)
    assert (optim.warmup_lr, optim.min_lr) == (1e-6, 1e-5)
    assert (recipe.ema_decay, recipe.amp) == (0.99996, "fp16")
    assert (data.img_size, data.interpolation) == (224, "bicubic")
    augment = data.augment
    assert augment.rand_augment == "rand-m9-n2-mstd0.5-inc1"
    assert (augment.random_erasing, augment.hflip, augment.repeats) == (0.25, 0.5, 3)
    assert augment.color_jitter is None
    assert (augment.mixup, augment.cutmix) == (0, 0)


def load_text(text: str, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_survive_a_round_trip(name, tmp_path: Path):
    recipe = load_recipe(find_recipe(name))
    again = load_text(to_yaml(recipe), tmp_path)
    assert to_dict(again) == to_dict(recipe)
    assert dataclasses.asdict(again) == dataclasses.asdict(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3", "unknown field 'epochs'.*fields here: out, seed"),
        ("optim: {learning_rate: 1}", "unknown field 'optim.learning_rate'"),
        ("optim: {epoch: 3}", "unknown field 'optim.epoch'; did you mean 'epochs'?"),
        ("data: {augment: {repeat: 1}}", "'data.augment.repeat'; did you mean 'repeats'?"),
        ("teacher: {nmae: x}", "unknown field 'teacher.nmae'; did you mean 'name'?"),
        ("[1, 2]", "expected a mapping of fields"),
        ("a: [", "can't be read as YAML"),
        ("optim: {lr: fast}", "optim.lr"),
        ("optim: {lr: -1}", "optim.lr: expected a finite number > 0, got -1"),
        ("student: {arch: lft}", "student.arch"),
        ("student: null", "student: expected a mapping of fields, got None"),
        ("optim: [1]", r"optim: expected a mapping of fields, got \[1\]"),
        ("loss: {tau: 0}", "loss.tau: expected a finite number > 0, got 0"),
        ("loss: {beta: -1}", "loss.beta: expected a finite number >= 0, got -1"),
        ("loss: {label_smoothing: 2}", "loss.label_smoothing: expected a number from 0 to 1"),
        ("loss: {alpha: 0.5}", "loss.alpha: 0.5 needs a teacher"),
        ("loss: {feature: mse}", "loss.feature: 'mse' needs a teacher"),
        (
            "{compile: true, compile_mode: reduce-overhead, distributed: fsdp}",
            "compile_mode: 'reduce-overhead' uses CUDA graphs, which need weights that stay",
        ),
        (
            "{compile: false, compile_mode: reduce-overhead}",
            "compile_mode: 'reduce-overhead' needs compile: true or auto",
        ),
        (
            "{compile: true, compile_mode: max-autotune, optim: {accumulate: 2}}",
            "can't accumulate gradients .optim.accumulate is 2.; expected auto or default",
        ),
        (
            "{batch_size: 9, data: {augment: {mixup: 0.2}}}",
            "batch_size: 9 is odd, and data.augment.mixup and cutmix mix .*expected an even number",
        ),
        ("teacher: {name: x}", "teacher: not used .*loss.feature and loss.pooled are null"),
        (
            "optim: {epochs: 5, warmup_epochs: 5}",
            r"optim.warmup_epochs: expected fewer than optim.epochs \(5\), got 5",
        ),
        ("checkpoint: {keep_every: 0}", "checkpoint.keep_every: expected .* > 0, got 0"),
        (
            "checkpoint: {keep_every: 3, every_epochs: 2}",
            "keep_every: 3, but .* only every 2 .* multiple of 2",
        ),
        ("batch_size: 0", "batch_size: expected .* > 0, got 0"),
        ("ema_decay: 1.0", "ema_decay: expected null"),
        ("teacher: {name: x}\nloss: {feature: mse, pairs: []}", "loss.pairs: empty"),
        ("loss: {projector: linear}", r"loss.projector: 'linear' projects .* loss.feature is null"),
        ("loss: {pooled: {weigth: 1}}", "'loss.pooled.weigth'; did you mean 'weight'"),
        ("loss: {pooled: {}}", "loss.pooled: needs a teacher"),
    ],
)
def test_wrong_recipes(text, message, tmp_path: Path):
    with pytest.raises(RecipeError, match=message):
        load_text(text, tmp_path)


def test_pooled_fields_are_refused_by_their_parser(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"loss.pooled.weight: expected a finite number > 0, got 0"
    ):
        load_text("loss: {pooled: {weight: 0}}", tmp_path)
    with pytest.raises(ValueError, match=r"loss.pooled"):
        load_text("loss: {pooled: {metric: l1}}", tmp_path)


@pytest.mark.parametrize("inference", ["recipe", "fastest"])
@pytest.mark.parametrize(
    "style",
    [
        "{{name: x, options: {{a: 1e-1}}, inference: {}}}",
        "\n  inference: {}  # a comment\n  name: x\n  options: {{a: 1e-1}}",
    ],
)
def test_recipes_with_teacher_inference_are_read(tmp_path, inference, style):
    """A removed field of earlier versions."""
    text = "loss: {alpha: 0.9}\noptim: {lr: 1e-5}\nteacher: "
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = load_text(text + style.format(inference), tmp_path)
    notes = [str(warning.message) for warning in caught]
    expected = f"recipe {tmp_path / 'recipe.yaml'}: teacher.inference: 'fastest' was removed"
    assert [note.startswith(expected) for note in notes] == [True] * (inference == "fastest")
    assert recipe.teacher == TeacherConfig(name="x", options={"a": 0.1})
    assert (recipe.optim.lr, recipe.loss.alpha) == (1e-5, 0.9)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("amp: off\nteacher: null\noptim: {lr: 1e-5}", {"amp": "off"}),
        ("device: cpu\namp: 'off'\nteacher: null\noptim: {lr: 1e-5}", {"amp": "off"}),
        ("data: {path: no}\ncompile: off\noptim: {lr: 1e-5}", {"compile": False}),
    ],
)
def test_words_that_yaml_takes_for_booleans(tmp_path, text, fields):
    recipe = load_text(text, tmp_path)
    assert {name: getattr(recipe, name) for name in fields} == fields
    assert recipe.data.path == ("no" if "path" in text else "")
    assert recipe.optim.lr == 1e-5


def test_unknown_recipe_name():
    with pytest.raises(RecipeError, match="did you mean 'lift_imagenet_mse'"):
        find_recipe("lift_imagenet_mes")


BOMB = "".join(
    f"    a{n}: &a{n} [{', '.join(['x' if n == 0 else f'*a{n - 1}'] * 10)}]\n" for n in range(11)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"student:\n  options:\n{BOMB}", "aliases expand to more than 20000 values"),
        ("student:\n  options: &a\n    again: *a\n", "nested more than 100 levels deep"),
        ("student: " + "[" * 5000, "nested more than 100 levels deep"),
        ("seed: 1 #" + "x" * (1 << 20), "larger than 1048576 bytes"),
    ],
    ids=["billion laughs", "cycle", "depth", "size"],
)
def test_a_recipe_that_expands_without_bound_is_refused(tmp_path, text, message):
    with pytest.raises(RecipeError, match=rf"recipe .*recipe.yaml: can't be read .*{message}"):
        load_text(text, tmp_path)


def test_aliases_of_a_bounded_size_are_read(tmp_path):
    text = "student: {options: &o {drop_path_rate: 0.2}}\nteacher: {options: *o}\n"
    recipe = load_text(text + "loss: {alpha: 0.5}\n", tmp_path)
    assert recipe.student.options == recipe.teacher.options == {"drop_path_rate": 0.2}


@pytest.mark.parametrize(
    ("section", "name"),
    [("student", "num_classes"), ("student", "base"), ("teacher", "name"), ("teacher", "weights")],
)
def test_options_that_repeat_a_field_are_refused(section, name):
    cls = {"student": StudentConfig, "teacher": TeacherConfig}[section]
    with pytest.raises(RecipeError, match=rf"^{section}.options.{name}: 5: .* {section}.{name}$"):
        cls(options={name: 5})
