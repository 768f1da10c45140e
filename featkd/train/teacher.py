"""The frozen teacher of a run, and the output shapes of teachers and students."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from featkd.cache import LayerShape, TeacherOutputs
from featkd.data import Batch
from featkd.models import create_teacher
from featkd.models.adapters import ImageAdapter, resize_map
from featkd.models.features import FeatureModel, Layer, NotPooledError, evaluating
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.remote import Location, locate_once
from featkd.runtime.seeding import derive_seed
from featkd.train.precision import AMP_DTYPES, autocast, cast_matmul_weights
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher_checks import check_classifier, check_finite, check_synsets, check_teacher
from featkd.train.teacher_images import image_adapter, teacher_size


def begin_graph_step(device: torch.device) -> None:
    """Allows CUDA graphs to overwrite the outputs of earlier replays from here on."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


class TeacherModel(NamedTuple):
    """The frozen model on the device.

    Attributes:
        model: the model.
        adapter: maps the student's images to the model's; None if they are the same.
    """

    model: FeatureModel
    adapter: ImageAdapter | None


class Teacher(nn.Module):
    """Runs the frozen teacher; returns its logits and feature maps.

    Args:
        source: from `create_teacher_model`.
        recipe: the run, for its precision and torch.compile settings.
        context: this process.
        logits: whether to compute logits; without them, nothing runs after the deepest layer.
        shapes: output shapes with the maps that are returned, in this order; each map is resized
            to its number of tokens.
    """

    def __init__(
        self,
        source: TeacherModel,
        recipe: Recipe,
        context: ProcessContext,
        *,
        logits: bool,
        shapes: OutputShapes,
    ) -> None:
        super().__init__()
        self.model, self._adapter = source
        self.layers = tuple(shape.layer for shape in shapes.maps)
        self.shapes = shapes
        self._tokens = tuple(shape.tokens for shape in shapes.maps)
        self._logits = logits
        self._amp = recipe.amp
        self._device = context.device
        if recipe.compiles_on(context.device.type):
            # Static shapes: after a partial batch, dynamo would run whole batches on kernels for
            # any size, and a cache's bytes would depend on the order of its shards.
            mode = recipe.compile_mode_on(context.device.type)
            self.compile(mode=mode, dynamic=False)

    def forward(self, images: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Logits and feature maps of a batch of the student's images."""
        if self._adapter is not None:
            images = self._adapter(images)
        if self._logits:
            logits, maps = self.model.forward_with_features(images, self.layers)
        else:
            logits, maps = None, self.model.forward_maps(images, self.layers)
        return logits, [
            x if x.shape[1] == tokens else resize_map(x, math.isqrt(tokens))
            for x, tokens in zip(maps, self._tokens, strict=True)
        ]

    def outputs(self, batch: Batch) -> TeacherOutputs:
        """Computes the outputs for a batch whose images are on the device."""
        with torch.no_grad(), autocast(self._amp, self._device):
            return TeacherOutputs(*self(batch.images))


def create_teacher_model(
    recipe: Recipe,
    num_classes: int | None,
    classes: Sequence[str],
    context: ProcessContext,
    notes: list[str],
) -> TeacherModel:
    """Creates the recipe's teacher on the device; its matmul weights get the dtype of `amp`.

    Args:
        recipe: the run; its teacher is not null.
        num_classes: outputs of a teacher whose weights don't set them; None or 0 for timm's
            default.
        classes: class names of the training set.
        context: this process.
        notes: notes for the user are appended here.

    Raises:
        RecipeError: the model can't be created, or its weights don't fit the run (see
            `featkd.train.teacher_checks`).
    """
    config = recipe.required_teacher
    options = {**config.options, "img_size": teacher_size(recipe)}
    checkpoint = find_weights_file("teacher.checkpoint", config.checkpoint)
    run = check_teacher(recipe, classes, checkpoint)
    known = run.get("num_classes")
    if known is None:
        known = num_classes or None
    if not config.pretrained and known is not None:
        options.setdefault("num_classes", known)
    if not config.has_weights:
        notes.append(f"teacher: {config.name} has random weights (teacher.random)")
    # Random weights must depend on the seed alone, not on the student created before: a cache is
    # written and read by different commands.
    torch.manual_seed(derive_seed(recipe.seed))
    with naming("teacher"):
        model = create_teacher(
            config.name,
            pretrained=config.pretrained,
            checkpoint=checkpoint,
            weights=config.weights,
            **options,
        )
    check_classifier(recipe, model)
    if config.pretrained:
        check_synsets(recipe, cast(Any, model).pretrained_cfg, classes)
    adapter = image_adapter(recipe, run, notes)
    check_finite(recipe, model)
    model.to(context.device)
    if recipe.amp in AMP_DTYPES:
        cast_matmul_weights(cast(nn.Module, model), AMP_DTYPES[recipe.amp])
    return TeacherModel(model, None if adapter is None else adapter.to(context.device))


def find_weights_file(field: str, name: str | None) -> Location | None:
    """Finds the file that a field of the recipe names, downloaded at most once; None for null.

    Raises:
        RecipeError: there is none.
    """
    if name is None:
        return None
    file = locate_once(name, field)
    if not file.is_file():
        raise RecipeError(f"{field}: no file {name!r}")
    return file


# Not mistakes in a recipe: files, memory, and other processes.
_OTHER_CAUSES = (OSError, MemoryError, torch.OutOfMemoryError, torch.distributed.DistError)


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Turns errors of a model or optimizer into a RecipeError that begins with the recipe's field.

    Models and optimizers report a wrong option by errors of any type, assertions among them.
    """
    try:
        yield
    except ConnectionError as error:
        if not str(error).startswith("pretrained: "):  # a download's
            raise
        raise ConnectionError(f"{field}.{error}") from error
    except (RecipeError, *_OTHER_CAUSES):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
        raise RecipeError(f"{field}: {kind}{lines[0]}") from error


class OutputShapes(NamedTuple):
    """Output shapes of a model for one image: number of classes, and a shape per feature map."""

    classes: int
    logits_dtype: str
    maps: tuple[LayerShape, ...]

    def of(self, layers: Sequence[Layer]) -> OutputShapes:
        """Returns the shapes with the maps of these layers alone, in their order."""
        by_layer = {shape.layer: shape for shape in self.maps}
        return self._replace(maps=tuple(by_layer[layer] for layer in layers))


def output_shapes(
    field: str,
    model: FeatureModel,
    layers: Sequence[Layer],
    recipe: Recipe,
    context: ProcessContext,
) -> OutputShapes:
    """Runs one image through a model, in evaluation mode and the recipe's precision.

    Args:
        field: "student" or "teacher".
        model: the model, on the device.
        layers: layers whose maps are computed.
        recipe: the run.
        context: this process.

    Raises:
        RecipeError: the model fails on an image of the recipe's size.
    """
    is_teacher = field == "teacher"
    size = teacher_size(recipe) if is_teacher else recipe.data.img_size
    name = "teacher.img_size" if is_teacher and size != recipe.data.img_size else "data.img_size"
    check_patches("teacher.img_size" if is_teacher else "data.img_size", model, size)
    image = torch.zeros(1, 3, size, size, device=context.device)
    config = recipe.required_teacher if is_teacher else recipe.student
    described = f"{field}.options: {config.options}: the {field} fails on an image of {name} {size}"
    with naming(described), evaluating(model), autocast(recipe.amp, context.device):
        try:
            logits, maps = model.forward_with_features(image, layers)
        except NotPooledError as error:
            why, way = f"{field}.options.global_pool", ""  # kNN pools too
            if recipe.loss.pooled is not None:
                why, way = f"loss.pooled: {field}", ", or loss.pooled: null"
            raise RecipeError(
                f"{why}: {error}; expected a model whose head pools "
                f"({field}.options.global_pool){way}"
            ) from error
    return OutputShapes(
        logits.shape[1],
        _dtype_name(logits.dtype),
        tuple(
            LayerShape(layer, x.shape[1], x.shape[2], _dtype_name(x.dtype))
            for layer, x in zip(layers, maps, strict=True)
        ),
    )


def check_patches(name: str, model: FeatureModel, size: int) -> None:
    """Checks that patches divide an image; timm leaves the rest of the pixels out.

    Args:
        name: field of the recipe that sets the size.
        model: the model.
        size: height and width of the image.

    Raises:
        RecipeError: they don't.
    """
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or getattr(embed, "dynamic_img_pad", False):
        return
    patch = max(embed.patch_size)
    if size % patch:
        least = max(size // patch * patch, patch)
        raise RecipeError(
            f"{name}: {size} is not a multiple of the patch size {patch} of "
            f"{type(model).__name__.removeprefix('Feature')}; expected for example {least} or "
            f"{least + patch}"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
