"""Builds the source of feature maps that a `DiagnoseConfig` names: files, or models on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from featkd.data import DataConfig
from featkd.diagnostics.config import DiagnoseConfig
from featkd.diagnostics.feature_files import FeatureFiles
from featkd.diagnostics.model_features import MeasuredModel, ModelFeatures
from featkd.diagnostics.source import Source, fingerprint
from featkd.models import create_teacher
from featkd.models.adapters import ImageAdapter
from featkd.models.export import exported_folder, load_exported
from featkd.models.preprocessing import read_preprocessing
from featkd.models.students import check_timm_name
from featkd.train.trained import load_trained

_OVERRIDES = ("img_size", "mean", "std", "crop_pct")


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
        return FeatureFiles(config)
    loaded = {name: _load(config, name) for name in config.models}
    overrides = {k: getattr(config, k) for k in _OVERRIDES if getattr(config, k) is not None}
    _, last, _ = loaded[config.models[-1]]
    largest = max(preprocessing["img_size"] for _, preprocessing, _ in loaded.values())
    data = DataConfig(workers=config.workers, **{**last, "img_size": largest, **overrides})
    measured, notes = [], []
    if config.random_models:
        notes.append(f"random weights: {' and '.join(config.random_models)}")
    for name, (model, preprocessing, identity) in loaded.items():
        own = {**preprocessing, **overrides}
        adapter = ImageAdapter(
            data.mean,
            data.std,
            own["mean"],
            own["std"],
            size=data.img_size,
            new_size=own["img_size"],
        )
        changed = {
            **({k: list(own[k]) for k in ("mean", "std")} if adapter.renormalises else {}),
            **({"img_size": own["img_size"]} if adapter.new_size else {}),
        }
        if changed:
            identity["images"] = changed
            values = ", ".join(f"{k} {value}" for k, value in changed.items())
            notes.append(f"the {name}'s images have {values}")
        if note := read_preprocessing(model)[1]:
            notes.append(f"{name}: {note}")
        notes += [
            f"images are preprocessed for the teacher ({k} {getattr(data, k)}), not for the {name} "
            f"({own[k]})"
            for k in ("crop_pct", "interpolation")
            if own[k] != getattr(data, k)
        ]
        measured.append(
            MeasuredModel(
                "" if name == "model" else name,
                model.to(device),
                getattr(config, f"{name}_layers", None) or config.layers,
                identity,
                adapter.to(device) if changed else None,
            )
        )
    return ModelFeatures(config, measured, data, device, notes)


# A model, its own preprocessing, and the values that identify its weights.
_Loaded = tuple[Any, dict[str, Any], dict[str, Any]]


def _load(config: DiagnoseConfig, name: str) -> _Loaded:
    """Creates a timm model, or loads one that holds its own weights and preprocessing."""
    word, file = getattr(config, name), config.weights_file(name)
    if word.endswith(".pt") or exported_folder(word) is not None:
        return _load_whole(config, name)
    options = dict(getattr(config, f"{name}_options") or {})
    if config.img_size is not None:
        options["img_size"] = config.img_size
    pretrained = config.pretrained and not file  # of a pair, one may have a file
    check_timm_name(name, word)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.settings.seed)
        model: Any = create_teacher(word, pretrained=pretrained, checkpoint=file, **options)
    preprocessing, _ = read_preprocessing(model)
    preprocessing["img_size"] = options.get("img_size", preprocessing["img_size"])
    weights = "pretrained" if pretrained else f"random, seed {config.settings.seed}"
    identity = {
        "name": word,
        "weights": fingerprint([file]) if file else weights,
        "options": {k: str(v) for k, v in options.items()},
    }
    return model, preprocessing, identity


def _load_whole(config: DiagnoseConfig, name: str) -> _Loaded:
    """Loads a checkpoint or an exported folder; checks that no field contradicts it."""
    word, options, file = getattr(config, name), f"{name}_options", config.weights_file(name)
    if word.endswith(".pt"):
        files = [Path(word)]
        if not files[0].is_file():
            raise FileNotFoundError(f"{name}: no checkpoint {word}")
        model: Any = load_trained(word)
    else:
        folder = exported_folder(word)
        assert folder is not None
        try:
            model = load_exported(folder)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        files = sorted(path for path in folder.iterdir() if path.is_file())
    if getattr(config, options):
        raise ValueError(
            f"{options}: got {getattr(config, options)!r} together with {word}, which sets them"
        )
    if file:
        raise ValueError(f"checkpoint: got {file} together with {word}, which holds the weights")
    preprocessing, _ = read_preprocessing(model)
    if config.img_size not in (None, preprocessing["img_size"]):
        raise ValueError(
            f"img_size: got {config.img_size} together with {word}, which expects "
            f"{preprocessing['img_size']}"
        )
    return model, preprocessing, {"name": word, "weights": fingerprint(files)}
