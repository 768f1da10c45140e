"""Loads trained students from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from featkd.models import FeatureModel, create_student
from featkd.models.weights import Weights, choose_weights
from featkd.train import checkpoint

# Entries of timm's pretrained_cfg that do not depend on the weights.
_OF_ARCHITECTURE = ("architecture", "fixed_input_size", "pool_size", "first_conv", "classifier")


def load_trained(path: str | PathLike[str], weights: Weights = "auto") -> FeatureModel:
    """Rebuilds the student of a training run and loads its weights.

    Args:
        path: checkpoint of `featkd distill` (last.pt, best.pt, epoch-<n>.pt), or its URL.
        weights: "model" for the weights of the last update, "model_ema" for their average,
            "auto" for the one of the two with the better score in this checkpoint.

    Returns:
        The student, on the CPU, in evaluation mode. Its `pretrained_cfg`, which timm's
        `create_transform` and hub functions read, describes the run: image size, mean, std, crop,
        interpolation and class names.

    Raises:
        CheckpointError: not a readable featkd checkpoint.
        ValueError: the checkpoint has no such weights.
    """
    return build_trained(checkpoint.load(path), path, weights)


def build_trained(
    state: Mapping[str, Any], path: str | PathLike[str], weights: Weights = "auto"
) -> FeatureModel:
    """Rebuilds the student of a checkpoint that is already read; see `load_trained`."""
    config, data = state["recipe"]["student"], state["recipe"]["data"]
    student = create_student(
        config["base"],
        config["arch"],
        config["teacher_dim"],
        state["num_classes"],
        **{"img_size": data["img_size"], **config["options"], "pretrained": False},
    )
    student.load_state_dict(choose_weights(state, weights, path))
    student.eval()
    size = config["options"].get("img_size", data["img_size"])
    described: Any = student
    # What timm knows of the base's weights (source, license, labels) is not true of these.
    described.pretrained_cfg = {
        **{k: v for k, v in described.pretrained_cfg.items() if k in _OF_ARCHITECTURE},
        "input_size": (3, size, size),
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "crop_pct": data["crop_pct"],
        "crop_mode": "center",
        "interpolation": data["interpolation"],
        "num_classes": state["num_classes"],
        "label_names": list(state["classes"]) or None,
    }
    described.default_cfg = described.pretrained_cfg
    return student
