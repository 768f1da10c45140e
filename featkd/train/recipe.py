"""Recipes: everything a training run depends on, as typed dataclasses read from YAML."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from featkd.data.config import DataConfig
from featkd.runtime.checks import suggestion

Arch = Literal["plain", "lift", "widelast", "heads_linear", "fixed_linear", "fixed_step"]


class RecipeError(ValueError):
    """A recipe that can't be run: names the field, what came and what is allowed."""


@dataclass
class StudentConfig:
    """The model that is trained.

    Args:
        base: timm name of the model that the student is made from.
        arch: what is changed for distillation: "plain" (nothing), "lift", "widelast", or one of
            the other published width schedules.
        teacher_dim: channels of the teacher's feature map, for every arch but "plain".
        num_classes: classes; null takes the number of class folders.
        options: further arguments of the timm model (img_size, patch_size, drop_path_rate, ...).
    """

    base: str = "deit_tiny_patch16_224"
    arch: Arch = "plain"
    teacher_dim: int = 384
    num_classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TeacherConfig:
    """The frozen model that is distilled.

    Args:
        name: timm name.
        pretrained: whether timm downloads its weights.
        checkpoint: a weights file instead (.safetensors, .pth, or a checkpoint of featkd).
        weights: which weights of a checkpoint of featkd: the averaged ones ("model_ema"), the
            last ones ("model"), or those of the two that scored better ("auto").
        options: further arguments of the timm model.
        inference: how its forward pass runs: as the recipe's `compile` says ("recipe"), or in the
            mode of torch that a short trial finds fastest here, and remembers ("fastest").
    """

    name: str = "cait_s24_224"
    pretrained: bool = False
    checkpoint: str | None = None
    weights: Literal["auto", "model", "model_ema"] = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    inference: Literal["recipe", "fastest"] = "recipe"


@dataclass
class LossConfig:
    """The objective: (1 - alpha) CE + beta w_feat L_feat + alpha L_soft.

    Args:
        alpha: weight of the teacher's logits, 0 to 1.
        beta: weight of the feature loss; multiplied by w_feat, as published.
        w_feat: weight of the feature loss.
        tau: temperature of the soft loss.
        feature: feature loss, "mse", "spectral" or null (none).
        pairs: [student layer, teacher layer] pairs; negative layers count from the end.
        label_smoothing: label smoothing of the cross-entropy; done before labels are mixed.
    """

    alpha: float = 0.0
    beta: float = 1.0
    w_feat: float = 0.2
    tau: float = 1.0
    feature: Literal["mse", "spectral"] | None = None
    pairs: list[tuple[int, int]] = field(default_factory=lambda: [(-1, -1)])
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        _require("loss.tau", self.tau, "> 0")
        for name in ("beta", "w_feat"):
            _require(f"loss.{name}", getattr(self, name), ">= 0")
        for name in ("alpha", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(
                    f"loss.{name}: expected a number from 0 to 1, got {getattr(self, name)!r}"
                )


@dataclass
class OptimConfig:
    """Optimizer and learning rate.

    Args:
        optimizer: timm's name of the optimizer.
        lr: learning rate at a global batch of lr_batch images; scaled linearly with the batch.
        lr_batch: see lr.
        weight_decay: not applied to biases, norms, pos_embed and tokens.
        eps: the optimizer's epsilon.
        clip_grad: largest gradient norm, or null.
        accumulate: micro-batches an update.
        epochs: passes over the training set.
        warmup_epochs: linear warm-up from warmup_lr, part of epochs.
        warmup_lr: learning rate at the start.
        min_lr: learning rate at the end of the cosine.
        step_on: whether the learning rate changes with each "epoch" or each "update".
    """

    optimizer: str = "adamw"
    lr: float = 5e-4
    lr_batch: int = 512
    weight_decay: float = 0.05
    eps: float = 1e-8
    clip_grad: float | None = None
    accumulate: int = 1
    epochs: int = 300
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    step_on: Literal["epoch", "update"] = "epoch"

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "lr_batch", "accumulate", "epochs"):
            _require(f"optim.{name}", getattr(self, name), "> 0")
        for name in ("weight_decay", "warmup_lr", "min_lr", "warmup_epochs"):
            _require(f"optim.{name}", getattr(self, name), ">= 0")
        if self.clip_grad is not None:
            _require("optim.clip_grad", self.clip_grad, "> 0")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise RecipeError(
                f"optim.warmup_epochs: {self.warmup_epochs} leaves nothing of the "
                f"{self.epochs} epochs (optim.epochs)"
            )


@dataclass
class CheckpointConfig:
    """What is kept of a run. The last and the best state are always kept.

    Args:
        every_epochs: epochs between two saves (and evaluations); the last epoch always counts.
        every_updates: also save after this many updates within an epoch, or null.
        keep_every: keep every k-th epoch's checkpoint for good, or null; k is a multiple of
            every_epochs.
    """

    every_epochs: int = 1
    every_updates: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_updates", "keep_every"):
            if getattr(self, name) is not None:
                _require(f"checkpoint.{name}", getattr(self, name), "> 0")
        if self.keep_every is not None and self.keep_every % self.every_epochs:
            raise RecipeError(
                f"checkpoint.keep_every: {self.keep_every}, but checkpoint.every_epochs saves only "
                f"every {self.every_epochs} epochs; expected a multiple of {self.every_epochs}"
            )


@dataclass
class Recipe:
    """A training run. Every field can be overridden on the command line.

    Args:
        out: folder for checkpoints, logs and metrics.
        seed: seed of everything random.
        batch_size: images a process and micro-batch.
        student: the model that is trained.
        teacher: the model that is distilled; null trains the student alone.
        loss: the objective.
        data: images and augmentation.
        optim: optimizer and schedule.
        checkpoint: what is kept.
        ema_decay: decay of the weight average, evaluated beside the weights; null for none.
        amp: automatic mixed precision: "off", "bf16" or "fp16" (with loss scaling).
        compile: whether torch.compile is used.
        compile_mode: torch.compile's mode; "reduce-overhead" and "max-autotune" record CUDA graphs,
            whose shapes are static here, as a training epoch's partial last batch is dropped.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        log_every: updates between two rows of metrics.
        cache: folder of `featkd cache`, whose rows take the place of the teacher's forward pass.
        cache_epochs: what follows where optim.epochs is more than the cache's views: "error", or
            "cycle", which begins with its first view anew.
    """

    out: str = "runs/featkd"
    seed: int = 0
    batch_size: int = 512
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ema_decay: float | None = 0.99996
    amp: Literal["off", "bf16", "fp16"] = "bf16"
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    device: str = "auto"
    log_every: int = 50
    cache: str | None = None
    cache_epochs: Literal["error", "cycle"] = "error"

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every"):
            _require(name, getattr(self, name), "> 0")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise RecipeError(
                f"ema_decay: expected null or a number in [0, 1), got {self.ema_decay}"
            )
        if self.teacher is None:
            if self.loss.alpha > 0:
                raise RecipeError(f"loss.alpha: {self.loss.alpha} needs a teacher, teacher is null")
            if self.loss.feature is not None:
                raise RecipeError(f"loss.feature: {self.loss.feature!r} needs a teacher")
        elif self.loss.alpha == 0 and self.loss.feature is None:
            raise RecipeError(
                "teacher: given, but the loss does not use it "
                "(loss.alpha is 0 and loss.feature is null)"
            )
        if self.cache is not None and self.teacher is None:
            raise RecipeError(
                f"cache: {self.cache!r} holds a teacher's outputs, but teacher is null; expected "
                "the teacher that the cache was made of"
            )
        if self.cache is not None:
            check_local("cache", self.cache)
        if self.compile_mode != "default" and not self.compile:
            raise RecipeError(f"compile_mode: {self.compile_mode!r} needs compile: true")
        if self.compile_mode != "default" and self.optim.accumulate > 1:
            # Gradients would be a graph's own memory, which its next run overwrites.
            raise RecipeError(
                f"compile_mode: {self.compile_mode!r} records CUDA graphs, which can't accumulate "
                f"gradients (optim.accumulate is {self.optim.accumulate}); expected 'default'"
            )
        if self.batch_size % 2 and self.data.augment.mixes:
            raise RecipeError(
                f"batch_size: {self.batch_size} is odd, and data.augment.mixup and cutmix mix "
                "images in pairs; expected an even number"
            )
        if self.loss.feature is not None and not self.loss.pairs:
            raise RecipeError("loss.pairs: empty, but loss.feature asks for a feature loss")


def check_local(name: str, folder: str) -> None:
    """Where runs can have a URL, a cache can't: as a path it would be a folder called "s3:".

    Raises:
        RecipeError: it is a URL.
    """
    if "://" in folder:
        raise RecipeError(f"{name}: expected a folder of this machine, got {folder!r}")


def _require(name: str, value: float, bound: Literal["> 0", ">= 0"]) -> None:
    if not (math.isfinite(value) and (value > 0 or (value == 0 and bound == ">= 0"))):
        raise RecipeError(f"{name}: expected a finite number {bound}, got {value!r}")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain lists, dicts, strings and numbers, as YAML and checkpoints hold it."""
    return {name: _untuple(value) for name, value in dataclasses.asdict(recipe).items()}


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a YAML text that reads back to an equal recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def _untuple(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untuple(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_untuple(inner) for inner in value]
    return value


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with featkd."""
    folder = resources.files("featkd.recipes")
    return sorted(p.name[: -len(".yaml")] for p in folder.iterdir() if p.name.endswith(".yaml"))


def find_recipe(name: str) -> Path:
    """A recipe file by path, or by the name of one that ships with featkd.

    Raises:
        RecipeError: there is neither; suggests the nearest shipped name.
    """
    if Path(name).is_file():
        return Path(name)
    names = shipped_recipes()
    if name in names:
        return Path(str(resources.files("featkd.recipes") / f"{name}.yaml"))
    raise RecipeError(
        f"recipe: no file {name!r} and no shipped recipe of that name"
        f"{suggestion(name, names)}; shipped: {', '.join(names)}"
    )


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: it can't be read, has an unknown field, or values of a wrong type.
        ValueError: values out of range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    check_fields(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        parsed = parser.parse_path(str(path))
    except ArgumentError as error:
        raise RecipeError(f"recipe {path}: {error}") from error
    built = parser.instantiate(parsed)
    return Recipe(**{entry.name: built[entry.name] for entry in dataclasses.fields(Recipe)})


def check_fields(path: Path) -> None:
    """Raise RecipeError where a recipe file has a field that recipes don't have.

    jsonargparse would refuse it as well; this names the nearest field.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path}: can't be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path}: expected a mapping of fields, got {content!r}")
    _check_mapping(content, Recipe, path, "")


def _check_mapping(content: Mapping[str, Any], cls: type, path: Path, prefix: str) -> None:
    known = field_types(cls)
    for key, value in content.items():
        if key not in known:
            raise RecipeError(
                f"recipe {path}: unknown field {prefix + str(key)!r}"
                f"{suggestion(str(key), list(known))}; fields here: {', '.join(known)}"
            )
        inner = known[key]
        if inner is None or (value is None and inner is TeacherConfig):
            continue
        if not isinstance(value, dict):
            raise RecipeError(
                f"recipe {path}: {prefix}{key}: expected a mapping of fields, got {value!r}"
            )
        _check_mapping(value, inner, path, f"{prefix}{key}.")


def field_types(cls: type) -> dict[str, type | None]:
    """Field name -> the dataclass it holds, or None for a plain value."""
    hints = typing.get_type_hints(cls)
    found: dict[str, type | None] = {}
    for entry in dataclasses.fields(cls):
        hint = hints[entry.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if union else (hint,)
        inner = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
        found[entry.name] = inner[0] if inner else None
    return found


def field_names(cls: type = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of all fields, e.g. "optim.lr"."""
    names = []
    for name, inner in field_types(cls).items():
        names.append(prefix + name)
        if inner is not None:
            names += field_names(inner, f"{prefix}{name}.")
    return names
