"""A trained student back from a checkpoint, without its recipe file."""

from __future__ import annotations

from os import PathLike

from featkd.models import FeatureModel, create_student
from featkd.models.weights import Weights, choose_weights
from featkd.train import checkpoint


def load_trained(path: str | PathLike[str], weights: Weights = "auto") -> FeatureModel:
    """Rebuild the student of a training run and load its weights.

    Args:
        path: a checkpoint of `featkd distill` (last.pt, best.pt, epoch-<n>.pt), or its URL.
        weights: "model" for the weights of the last update, "model_ema" for their average,
            "auto" for those of the two that scored better when the file was written.

    Returns:
        The student, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: no checkpoint of featkd.
        ValueError: it has no such weights.
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
