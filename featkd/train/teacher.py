"""The frozen teacher of a run: built as the recipe says, and asked batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from featkd.cache import LayerShape, Taught
from featkd.data import Batch
from featkd.models import create_teacher
from featkd.models.features import FeatureModel, num_layers, resolve_layers
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.remote import locate
from featkd.runtime.seeding import derive_seed
from featkd.train.precision import autocast, hold_products
from featkd.train.recipe import Recipe, RecipeError, TeacherConfig
from featkd.train.teacher_mode import Mode, TeacherForward, fastest


class Shapes(NamedTuple):
    """What a model puts out of one image: the number of logits, and maps."""

    classes: int
    logits_dtype: str
    maps: tuple[LayerShape, ...]


class Teacher:
    """What says of each batch what the student is to learn: a model's forward pass.

    Args:
        recipe: with a teacher.
        num_classes: of the images; those of a teacher without weights of its own.
        context: this process.
        notes: receives what the user should know.
        layers: depth of the model -> those whose maps are wanted, each of which comes once, in
            ascending order, and logits beside them; default: the recipe's pairs, one by one, and
            logits where the recipe's loss uses them.

    Raises:
        RecipeError: the model can't be made; names the field.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        context: ProcessContext,
        notes: list[str],
        layers: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        assert recipe.teacher is not None
        self.model = _create(recipe.teacher, recipe, num_classes, notes)
        self.model.to(context.device)
        if recipe.amp == "bf16":
            hold_products(cast(nn.Module, self.model), torch.bfloat16)
        if layers is None:
            self.layers = pair_layers(recipe, self.model, "teacher")
        else:
            self.layers = tuple(sorted(set(layers(num_layers(self.model)))))
        self._amp = recipe.amp
        self._device = context.device
        self.shapes = shapes_of(self.model, self.layers, recipe, context)
        logits = layers is not None or recipe.loss.alpha > 0
        plain = TeacherForward(self.model, self.layers, logits)
        mode = Mode(recipe.compile, recipe.compile_mode)
        if recipe.teacher.inference == "fastest":
            mode = self._fastest(plain, recipe, context, notes)
        self._forward = plain.in_mode(mode)

    def teach(self, batch: Batch) -> Taught:
        """Logits and maps of a batch whose images are on the device."""
        with torch.no_grad(), autocast(self._amp, self._device):
            return Taught(*self._forward(batch.images))

    def _fastest(
        self, plain: TeacherForward, recipe: Recipe, context: ProcessContext, notes: list[str]
    ) -> Mode:
        """Process 0's trial, on a batch of the recipe's size."""
        size = recipe.data.img_size
        images = torch.zeros(recipe.batch_size, 3, size, size, device=context.device)

        def run(forward: TeacherForward) -> None:
            with torch.no_grad(), autocast(self._amp, self._device):
                logits, maps = forward(images)
            (maps[-1] if logits is None else logits).sum().item()  # waits for the device

        found = None
        if context.is_main:
            config = recipe.teacher
            assert config is not None
            wanted = (plain.layers, plain.logits, recipe.amp)
            found = fastest(plain, run, (config.name, config.options, images.shape, *wanted))
        mode, how = context.broadcast(found)
        notes.append(f"teacher.inference: {how}")
        assert isinstance(mode, Mode)
        return mode


def _create(
    config: TeacherConfig, recipe: Recipe, num_classes: int, notes: list[str]
) -> FeatureModel:
    options = {"img_size": recipe.data.img_size, **config.options}
    checkpoint = config.checkpoint
    if checkpoint is not None and not locate(checkpoint, "teacher.checkpoint").is_file():
        raise RecipeError(f"teacher.checkpoint: no file {checkpoint!r}")
    if not config.pretrained:
        options.setdefault("num_classes", num_classes)
        if checkpoint is None:
            notes.append(
                f"teacher: {config.name} has random weights "
                f"(teacher.pretrained is false and teacher.checkpoint is null)"
            )
    # Random weights are the seed's alone, whatever student was made before: caches rely on it.
    torch.manual_seed(derive_seed(recipe.seed))
    with naming("teacher"):
        return create_teacher(
            config.name,
            pretrained=config.pretrained,
            checkpoint=checkpoint,
            weights=config.weights,
            **options,
        )


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Say which part of the recipe a model's error is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{field}: {error}") from error


def pair_layers(
    recipe: Recipe, model: FeatureModel, whose: Literal["student", "teacher"]
) -> tuple[int, ...]:
    """One side of the recipe's layer pairs, counted from 0; none without a feature loss.

    Raises:
        RecipeError: a layer is out of the model's range.
    """
    return resolve_pairs(recipe, num_layers(model), whose) if recipe.loss.feature else ()


def resolve_pairs(
    recipe: Recipe, depth: int, whose: Literal["student", "teacher"]
) -> tuple[int, ...]:
    """The same for a model of `depth` layers, with or without a feature loss."""
    side = 0 if whose == "student" else 1
    try:
        return resolve_layers([pair[side] for pair in recipe.loss.pairs], depth)
    except ValueError as error:
        raise RecipeError(f"loss.pairs ({whose}): {error}") from error


def shapes_of(
    model: FeatureModel, layers: Sequence[int], recipe: Recipe, context: ProcessContext
) -> Shapes:
    """One image through a model, in evaluation mode and the recipe's precision."""
    size = recipe.data.img_size
    image = torch.zeros(1, 3, size, size, device=context.device)
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(recipe.amp, context.device):
        logits, maps = model.forward_with_features(image, layers)
    model.train(training)
    return Shapes(
        logits.shape[1],
        name_of(logits.dtype),
        tuple(
            LayerShape(layer, x.shape[1], x.shape[2], name_of(x.dtype))
            for layer, x in zip(layers, maps, strict=True)
        ),
    )


def name_of(dtype: torch.dtype) -> str:
    """ "float32" and the like."""
    return str(dtype).removeprefix("torch.")
