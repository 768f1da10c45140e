"""Scores against plain formulas; one pass over the images without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from featkd.data import Batch
from featkd.evaluation.topk import Evaluation, EvaluationError, evaluate

K = 7


class Batches:
    """Loader of batches of 5 and one of 3 images; counts the batches read."""

    def __init__(self, full: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(5 * full + 3, K, generator=generator)
        self.targets = torch.randint(K, (len(self.images),), generator=generator)
        self.given = 0

    def __iter__(self):
        pairs = zip(self.images.split(5), self.targets.split(5), strict=True)
        for images, targets in pairs:
            self.given += 1
            yield Batch(images, targets, [], torch.empty(0), torch.empty(0))


class Reads(TorchDispatchMode):
    """Counts operations that would wait for a device: values read by Python, shapes from values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).removeprefix("aten.").lstrip("_").rstrip("2")
        self.count += name in ("local_scalar_dense", "unique", "nonzero", "unique_dim")
        return func(*args, **(kwargs or {}))


def score(loader: Iterable[Batch], *models: torch.nn.Module) -> dict[str, Evaluation]:
    named = {str(number): model for number, model in enumerate(models)}
    return evaluate(named, loader, torch.device("cpu"), nullcontext)  # type: ignore[arg-type]


def test_scores_of_two_models_from_one_pass():
    loader = Batches(4)
    turned = torch.nn.Linear(K, K)
    found = score(loader, torch.nn.Identity(), turned)
    assert loader.given == 5
    for name, logits in ("0", loader.images), ("1", turned(loader.images).detach()):
        ranked = 100.0 * (logits.argsort(descending=True) == loader.targets[:, None])
        top1, top5 = ranked[:, 0].mean().item(), ranked[:, :5].sum(1).mean().item()
        loss = F.cross_entropy(logits, loader.targets).item()
        expected = {"top1": top1, "top5": top5, "loss": loss, "images": 23}
        assert vars(found[name]) == pytest.approx(expected)
    assert found["0"] != found["1"]


def test_no_batch_waits_for_the_device(monkeypatch):
    def one_hot(x, classes):  # torch's checks its values, on CPUs only
        return (x[..., None] == torch.arange(classes)).long()

    monkeypatch.setattr(F, "one_hot", one_hot)
    counts = []
    for full in (1, 6):
        with Reads() as reads:
            score(Batches(full), torch.nn.Identity())
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_a_nan_loss_is_reported():
    loader = Batches(2)
    loader.images[3, 1] = float("nan")
    (found,) = score(loader, torch.nn.Identity()).values()
    assert found.loss != found.loss


def test_modes_are_restored_and_no_images_are_an_error():
    models = torch.nn.Identity().train(), torch.nn.Identity().eval()
    broken = (1 / 0 for _ in range(1))  # as a loader whose images can't be read
    for loader, error in ((Batches(1), nullcontext()), (broken, pytest.raises(ZeroDivisionError))):
        with error:
            score(loader, *models)
        assert [model.training for model in models] == [True, False]
    with pytest.raises(EvaluationError, match="none of the images could be read"):
        score([], *models)
