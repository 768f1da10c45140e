"""Class folders and outputs of a classifier are matched by name, never by chance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from featkd.evaluation.classes import match_classes


def model(count: int, names: list[str] | None = None) -> SimpleNamespace:
    return SimpleNamespace(num_classes=count, pretrained_cfg={"label_names": names})


@pytest.mark.parametrize(
    ("count", "names", "folders", "outputs", "note"),
    [
        (3, ["a", "b", "c"], ["a", "b", "c"], [0, 1, 2], ""),
        (3, ["c", "b", "a"], ["a", "b", "c"], [2, 1, 0], ""),
        (4, ["a", "b", "c"], ["a", "c"], [0, 2], "2 classes of the model without a folder"),
        (3, ["a", "b", "c"], ["a", "b", "x"], None, "1 class folder of 3: x; its 3 classes: a, b,"),
        (2, None, ["a", "b"], [0, 1], "in the order of the folders' names: a, b"),
        (3, None, ["a", "b"], None, "the model has 3 classes without names, and there are 2 class"),
        (0, None, ["a", "b"], None, "the model has no classifier"),
        (1000, None, ["n01440764", "n01484850"], [0, 2], "998 classes of the model without a"),
        (1000, None, ["cat", "dog"], None, "no class for 2 class folders of 2: cat, dog; its 1000"),
    ],
)
def test_outputs_of_folders(count, names, folders, outputs, note):
    found = match_classes(model(count, names), folders)  # type: ignore[arg-type]
    assert found.outputs == outputs
    assert note in found.note
    assert bool(note) == bool(found.note)
    assert len(found.names) == (0 if outputs is None else count)
    if outputs is not None and names:
        assert [found.names[i] for i in outputs] == folders
