"""Exports the student of a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

import featkd
from featkd.data import DataConfig, build_transform
from featkd.data.images import decode_image, read_file
from featkd.data.imageset import DATA_ERRORS, open_source
from featkd.data.walk import find_files, warn_of_repeated_links
from featkd.models.export import Exported, Form, Precision, check_request, export_model
from featkd.models.features import FeatureModel
from featkd.models.model_card import NOT_GIVEN, render_card
from featkd.models.registered import default_cfgs
from featkd.models.students import GENERAL_NAME
from featkd.models.weights import Weights, find_weights
from featkd.runtime.names import listed, plural
from featkd.train import checkpoint
from featkd.train.trained import build_trained

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
# A path or URL up to its last part, perhaps after timm's name of a source.
_PLACE = re.compile(r"^(local-dir:)?(?:[~/]|[\w+-]+://).*?/?([^/]*)/*$", re.DOTALL)


@dataclass(frozen=True)
class ExportedStudent(Exported):
    """An exported student; see `Exported`.

    Attributes:
        weights: "model" or "model_ema".
        images_from: folder of the images that were compared; "random" for random ones.
        notes: facts that the user should know.
    """

    weights: str = ""
    images_from: str = ""
    notes: list[str] = field(default_factory=list)


def export_checkpoint(
    path: str | os.PathLike[str],
    form: Form,
    out: str | os.PathLike[str],
    *,
    weights: Weights = "auto",
    data: str | os.PathLike[str] | None = None,
    images: int = 10,
    precision: Precision = "fp32",
    license: str | None = None,
) -> ExportedStudent:
    """Exports the student of a checkpoint; see `featkd.models.export.export_model`.

    The teacher, the losses and the projectors of the losses are not part of it.

    Args:
        path: checkpoint of `featkd distill`, or its URL.
        form: "safetensors", "timm", "onnx" or "pt2".
        out: a new or an empty folder.
        weights: weights of the last update (model), their average (model_ema), or the ones with
            the better score (auto).
        data: folder of images to compare the exported model on with the checkpoint's, at any depth
            (default: the recipe's validation images, or random ones without them).
        images: number of images to compare on, spread evenly over the folder.
        precision: precision of an ONNX model; its inputs and outputs remain float32.
        license: license of the weights for the model card of timm, as an SPDX identifier
            (default: not given).

    Raises:
        CheckpointError: not a readable featkd checkpoint.
        ValueError: an argument is out of range, or the checkpoint has no such weights.
        FileNotFoundError: `data` does not exist or holds no image.
        BadImageError: an image can't be read.
        ImportError: a package of `featkd[export]` is missing.
        ExportError: torch can't export the student, or the outputs differ. Nothing is written.
    """
    check_request(form, out, precision)
    if images < 1:
        raise ValueError(f"images: expected a whole number >= 1, got {images}")
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(
            f"license: expected an SPDX identifier such as apache-2.0 or cc-by-nc-4.0, got "
            f"{license!r}"
        )
    state = checkpoint.load(path)
    student = build_trained(state, path, weights)
    chosen = find_weights(state, weights, path) or "model"
    batch, images_from, notes = _images(student, state["recipe"]["data"], data, images)
    card = None
    if form == "timm":
        card = render_card(card_fields(state, student, chosen, Path(out).absolute().name, license))
        if license is None:
            notes.append(f"README.md: license: {NOT_GIVEN}; --license ID sets it, as apache-2.0")
    elif license is not None:
        notes.append(f"license: {license} is not written; only --to timm has a model card")
    details = {
        "version": featkd.__version__,
        "weights": chosen,
        "update": state["update"],
        "epoch": state["epoch"],
        "scores": _scores(state, chosen),
        "recipe": without_places(state["recipe"]),
    }
    exported = export_model(
        student,
        form,
        out,
        batch,
        precision=precision,
        details=details,
        card=card,
    )
    return ExportedStudent(**vars(exported), weights=chosen, images_from=images_from, notes=notes)


def without_places(value: Any) -> Any:
    """Replaces absolute paths and URLs in a recipe by their last parts: exports are published."""
    if isinstance(value, Mapping):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(inner) for inner in value]
    return _PLACE.sub(r"\1\2", value) if isinstance(value, str) else value


def _images(
    student: FeatureModel, recipe: Mapping[str, Any], folder: Any, count: int
) -> tuple[Tensor, str, list[str]]:
    """Returns preprocessed images, where they come from, and notes.

    Args:
        student: its `pretrained_cfg` describes the preprocessing.
        recipe: entry "data" of the recipe.
        folder: folder of images; None for the recipe's.
        count: number of images; fewer if there are fewer.
    """
    record = cast(Any, student).pretrained_cfg
    known = {entry.name for entry in dataclasses.fields(DataConfig)} - {"augment"}
    config = DataConfig(
        **{key: value for key, value in recipe.items() if key in known}
        | {"img_size": record["input_size"][-1], "mean": record["mean"], "std": record["std"]}
    )
    transform = build_transform(config)

    def load(files: Any, read: Callable[[Any], tuple[bytes, str]]) -> Tensor:
        """Images spread evenly over the files, as many as there are."""
        number = min(count, len(files))
        chosen = (files[i * len(files) // number] for i in range(number))
        return torch.stack([transform(decode_image(*read(file))) for file in chosen])

    if folder is not None:
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"data: expected a folder of images, got {folder}")
        files, repeated = find_files(os.fspath(folder), IMG_EXTENSIONS)
        warn_of_repeated_links(repeated)
        if not files:
            raise FileNotFoundError(
                f"data: expected files ending in {', '.join(IMG_EXTENSIONS)} below {folder}, got "
                "none"
            )
        files.sort()
        return load(files, lambda name: (read_file(name), name)), os.fspath(folder), []
    try:
        source = open_source(config, "val")
    except (FileNotFoundError, ValueError, *DATA_ERRORS) as error:
        random = torch.randn(count, *record["input_size"], generator=torch.Generator())
        return random, "random", [f"compared on random images; --data DIR names others: {error}"]
    found = load(range(len(source)), lambda i: (source.read(i)[0], source.name(i)))
    return found, source.folder, []


def _scores(state: Mapping[str, Any], chosen: str) -> dict[str, float]:
    """Scores of the chosen weights; empty if this checkpoint was not evaluated."""
    return dict(state["scores"].get(chosen.replace("model_ema", "ema"), {}))


def card_fields(
    state: Mapping[str, Any],
    student: FeatureModel,
    chosen: str,
    name: str,
    license: str | None = None,
) -> dict[str, Any]:
    """Fields of a student's model card (see `featkd.models.model_card.render_card`).

    Args:
        state: content of the checkpoint.
        student: the student.
        chosen: its weights, "model" or "model_ema".
        name: name of the model.
        license: license of the weights.
    """
    recipe, record = without_places(state["recipe"]), cast(Any, student).pretrained_cfg
    config, teacher, optim = recipe["student"], recipe["teacher"], recipe["optim"]
    arch = config["arch"]
    changed = "" if arch == "plain" else f" ({arch}, teacher width {config['teacher_dim']})"
    origin = f"distilled from {teacher['name']}" if teacher else "trained without a teacher"
    classes = state["classes"]
    count = sum(p.numel() for p in student.parameters())
    path = recipe["data"].get("path") or NOT_GIVEN
    channels, height, across = record["input_size"]
    mean, std = (", ".join(f"{x:g}" for x in record[name]) for name in ("mean", "std"))
    ema = f"exponential average over the updates (decay {recipe.get('ema_decay')})"
    batch = recipe["batch_size"] * state["world_size"] * optim["accumulate"]
    lr = f"{optim.get('lr', NOT_GIVEN)} per {optim.get('lr_batch', NOT_GIVEN)} images"
    return {
        "name": name,
        "license": license or NOT_GIVEN,
        "task": "image-classification" if state["num_classes"] else "image-feature-extraction",
        "summary": f"{config['base']}{changed}, {origin}, with featkd {featkd.__version__}.",
        "needs_featkd": record["architecture"] in (GENERAL_NAME, *default_cfgs),
        "model": {
            "architecture": f"{config['base']}{changed}",
            "parameters": f"{count:,}",
            "input": f"{channels} x {height} x {across}",
            "preprocessing": f"central crop {record['crop_pct']}, {record['interpolation']}, mean "
            f"{mean}, std {std}",
            "output": f"logits of {plural(state['num_classes'], 'class')}: {listed(classes)}"
            if state["num_classes"]
            else f"features, {plural(cast(Any, student).num_features, 'channel')}",
            "weights": ema if chosen == "model_ema" else "of the last update",
        },
        "training": {
            "teacher": _described_teacher(teacher),
            "loss": ", ".join(f"{key} {value}" for key, value in recipe["loss"].items()),
            "images": f"{state['loader']['num_images']} of {path}",
            "optimizer": f"{optim['optimizer']}, learning rate {lr}, weight decay "
            f"{optim['weight_decay']}, batch {batch}, amp {recipe.get('amp', NOT_GIVEN)}",
            "length": f"{plural(state['update'], 'update')}, {plural(state['epoch'], 'epoch')}",
            "software": ", ".join(f"{key} {value}" for key, value in state["versions"].items()),
        },
        "scores": {
            _SCORES.get(key, key): f"{value:.4g}" for key, value in _scores(state, chosen).items()
        }
        or {"scores": "none: this checkpoint was not evaluated"},
    }


_SCORES = {
    "top1": "top-1 accuracy, %",
    "top5": "top-5 accuracy, %",
    "knn_top1": "kNN top-1 accuracy, %",
    "images": "images",
}


def _described_teacher(teacher: Mapping[str, Any] | None) -> str:
    if teacher is None:
        return "none"
    weights = "timm's weights" if teacher.get("pretrained") else "random weights"
    if file := teacher.get("checkpoint"):
        weights = f"weights {file}"
    return f"{teacher['name']}, {weights}"
