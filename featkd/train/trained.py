"""Loads trained students from checkpoints."""

from __future__ import annotations

from os import PathLike

from featkd.models import FeatureModel, create_student
from featkd.models.weights import Weights, choose_weights
from featkd.train import checkpoint


def load_trained(path: str | PathLike[str], weights: Weights = "auto") -> FeatureModel:
    """Rebuilds the student of a training run and loads its weights.

    Args:
        path: checkpoint of `featkd distill` (last.pt, best.pt, epoch-<n>.pt), or its URL.
        weights: "model" for the weights of the last update, "model_ema" for their average,
            "auto" for the one of the two with the better score in this checkpoint.

    Returns:
        The student, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: not a readable featkd checkpoint.
        ValueError: the checkpoint has no such weights.
    """
    state = checkpoint.load(path)
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
    return student
