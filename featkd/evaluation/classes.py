"""Outputs of a classifier that stand for the class folders of an image set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from timm.data import ImageNetInfo, infer_imagenet_subset

from featkd.models.features import FeatureModel
from featkd.runtime.names import listed, plural


class ClassMatch(NamedTuple):
    """Outputs of a classifier that stand for class folders.

    Attributes:
        outputs: index of the output of each folder; None if top-1 can't be computed.
        names: names of all outputs.
        note: note for the user; "" if there is nothing to note.
    """

    outputs: list[int] | None
    names: list[str]
    note: str


def match_classes(model: FeatureModel, folders: Sequence[str]) -> ClassMatch:
    """Finds the output of a model for each class folder, by name.

    The names of the outputs are those in `model.pretrained_cfg["label_names"]`, which students of
    `featkd distill` have, or ImageNet's synsets if their number fits. If the names are unknown and
    their number is that of the folders, the outputs are assumed to be in the order of the folders,
    and the note says so.

    Args:
        model: a model with `num_classes` outputs.
        folders: names of the class folders.
    """
    count: int = cast(Any, model).num_classes
    if count == 0:
        return ClassMatch(None, [], "top-1 left out: the model has no classifier")
    names = _names(model)
    if not names and count == len(folders):
        note = (
            "the names of the model's classes are unknown; top-1 assumes that its outputs are in "
            f"the order of the folders' names: {listed(folders, 3)}"
        )
        return ClassMatch([*range(count)], [*folders], note)
    if not names:
        note = f"top-1 left out: the model has {count} classes without names, and there are "
        return ClassMatch(None, [], f"{note}{plural(len(folders), 'class folder')}")
    place = {name: i for i, name in enumerate(names)}
    if missing := [folder for folder in folders if folder not in place]:
        note = (
            f"top-1 left out: the model has no class for {plural(len(missing), 'class folder')} of "
            f"{len(folders)}: {listed(missing, 5)}; its {plural(count, 'class')}: "
            f"{listed(names, 3)}"
        )
        return ClassMatch(None, [], note)
    rest = count - len(folders)
    note = f"{plural(rest, 'class')} of the model without a folder" if rest else ""
    return ClassMatch([place[folder] for folder in folders], output_names(model), note)


def output_names(model: FeatureModel) -> list[str]:
    """Returns a name for each output: of its class, or "output 7" if that is unknown."""
    names = _names(model)
    return names + [f"output {i}" for i in range(len(names), cast(Any, model).num_classes)]


def _names(model: Any) -> list[str]:
    """Names of the outputs; empty if they are unknown."""
    own = model.pretrained_cfg.get("label_names")
    subset = None if own else infer_imagenet_subset(model)
    return [*(own or ())] if subset is None else ImageNetInfo(subset).label_names()
