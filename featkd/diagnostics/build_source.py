"""Builds the source of feature maps that a `DiagnoseConfig` names: files, or models on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featkd.data import DataConfig
from featkd.diagnostics.config import DiagnoseConfig
from featkd.diagnostics.feature_files import FeatureFiles
from featkd.diagnostics.model_features import MeasuredModel, ModelFeatures
from featkd.diagnostics.source import Source, fingerprint
from featkd.models import FeatureModel, create_teacher
from featkd.models.adapters import ImageAdapter
from featkd.models.export import exported_folder, load_exported
from featkd.models.preprocessing import read_preprocessing
from featkd.models.students import check_timm_name
from featkd.train.trained import load_trained

_OVERRIDES = ("img_size", "mean", "std", "crop_pct")


@dataclass(frozen=True)
class _LoadedModel:
    """A model with its own preprocessing and the values that identify its weights."""

    model: FeatureModel
    preprocessing: dict[str, Any]
    identity: dict[str, Any]


def build_source(config: DiagnoseConfig, device: torch.device) -> Source:
    """Builds the source of feature maps.

    Args:
        config: configuration of the run.
        device: device of the models.

    Raises:
        FileNotFoundError: a folder, a checkpoint or every image is missing.
        UnreadableError: the first feature file cannot be used.
        ValueError: a field does not fit the models or files.
    """
    if config.features is not None:
        return FeatureFiles(
            Path(config.features),
            config.layers,
            limit=config.images,
            allow_pickle=config.allow_pickle,
            prefix_tokens=config.prefix_tokens,
            chunk_size=config.batch_size,
            on_bad=config.on_bad,
        )
    assert config.data is not None  # checked by DiagnoseConfig
    loaded = {name: _load(config, name) for name in config.models}
    overrides = {k: getattr(config, k) for k in _OVERRIDES if getattr(config, k) is not None}
    last = loaded[config.models[-1]].preprocessing
    largest = max(each.preprocessing["img_size"] for each in loaded.values())
    data = DataConfig(workers=config.workers, **{**last, "img_size": largest, **overrides})
    measured, notes = [], []
    for name, each in loaded.items():
        layers = getattr(config, f"{name}_layers", None) or config.layers
        own = {**each.preprocessing, **overrides}
        adapter = ImageAdapter(
            *(data.mean, data.std, own["mean"], own["std"]),
            size=data.img_size,
            new_size=own["img_size"],
        )
        identity = dict(each.identity)
        changed = {
            **({k: list(own[k]) for k in ("mean", "std")} if adapter.renormalises else {}),
            **({"img_size": own["img_size"]} if adapter.new_size else {}),
        }
        if changed:
            identity["images"] = changed
            values = ", ".join(f"{k} {value}" for k, value in changed.items())
            notes.append(f"images of the {name} have its own {values}")
        if note := read_preprocessing(each.model)[1]:
            notes.append(f"{name}: {note}")
        for k in ("crop_pct", "interpolation"):
            if own[k] != getattr(data, k):
                notes.append(
                    f"images are preprocessed for the teacher ({k} {getattr(data, k)}), not for "
                    f"the {name} ({own[k]})"
                )
        measured.append(
            MeasuredModel(
                "" if name == "model" else name,
                each.model.to(device),
                None if layers is None else tuple(layers),
                identity,
                adapter.to(device) if changed else None,
            )
        )
    source = ModelFeatures(
        measured,
        Path(config.data),
        data,
        device=device,
        bf16=config.amp == "bf16",
        limit=config.images,
        chunk_size=config.batch_size,
        on_bad=config.on_bad,
    )
    if config.random_models:
        source.notes.append(f"random weights: {' and '.join(config.random_models)}")
    source.notes += notes
    return source


def _load(config: DiagnoseConfig, name: str) -> _LoadedModel:
    """Loads a trained student's checkpoint, or creates a timm model."""
    word = getattr(config, name)
    if word.endswith(".pt"):
        return _load_trained(config, name, word)
    if (folder := exported_folder(word)) is not None:
        return _load_exported(config, name, word, folder)
    file = config.weights_file(name)
    options = dict(getattr(config, f"{name}_options") or {})
    if config.img_size is not None:
        options["img_size"] = config.img_size
    pretrained = config.pretrained and not file  # of a pair, one may have a file
    check_timm_name(name, word)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.settings.seed)
        model: Any = create_teacher(word, pretrained=pretrained, checkpoint=file, **options)
    preprocessing = _preprocessing(model)
    if "img_size" in options:
        preprocessing["img_size"] = options["img_size"]
    weights = "pretrained" if pretrained else f"random, seed {config.settings.seed}"
    identity = {
        "name": word,
        "weights": fingerprint([file]) if file else weights,
        "options": {k: str(v) for k, v in options.items()},
    }
    return _LoadedModel(model, preprocessing, identity)


def _preprocessing(model: Any) -> dict[str, Any]:
    """Preprocessing that timm's record of a model describes."""
    return read_preprocessing(model)[0]


def _load_trained(config: DiagnoseConfig, name: str, word: str) -> _LoadedModel:
    path = Path(word)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no checkpoint {word}")
    model = load_trained(path)
    return _complete(config, name, word, model, [path])


def _load_exported(config: DiagnoseConfig, name: str, word: str, folder: Path) -> _LoadedModel:
    try:
        model = load_exported(folder)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    return _complete(config, name, word, model, sorted(p for p in folder.iterdir() if p.is_file()))


def _complete(
    config: DiagnoseConfig, name: str, word: str, model: FeatureModel, files: Sequence[Path]
) -> _LoadedModel:
    """Checks that no field contradicts a model that holds its own weights and preprocessing."""
    options, file = f"{name}_options", config.weights_file(name)
    if getattr(config, options):
        raise ValueError(
            f"{options}: got {getattr(config, options)!r} together with {word}, which sets them"
        )
    if file:
        raise ValueError(f"checkpoint: got {file} together with {word}, which holds the weights")
    preprocessing = _preprocessing(model)
    if config.img_size not in (None, preprocessing["img_size"]):
        raise ValueError(
            f"img_size: got {config.img_size} together with {word}, which expects "
            f"{preprocessing['img_size']}"
        )
    return _LoadedModel(model, preprocessing, {"name": word, "weights": fingerprint(files)})
