"""Weighted kNN against scikit-learn, in chunks, with ties and bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

from featkd.evaluation import knn, knn_predict

CLASSES = 5


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters, so that neighbours disagree."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(9))
    lengths = 10 ** torch.rand(count, 1, generator=generator)  # which cosine ignores
    return (centres[labels] + torch.randn(count, 8, generator=generator)) * lengths, labels


def classifier(k: int, temperature: float) -> Pipeline:
    """By Euclidean distances d of unit vectors, whose cosine is 1 - d^2 / 2."""

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance**2 / 2) / temperature)

    return make_pipeline(Normalizer(), KNeighborsClassifier(k, weights=weights))


@pytest.mark.parametrize("rows", [1 << 24, 7])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (6, 0.07), (15, 0.5)])
def test_predictions_equal_those_of_scikit_learn(monkeypatch, rows, k, temperature):
    bank, labels = clusters(60, 0)
    queries, _ = clusters(25, 1)
    monkeypatch.setattr(knn, "_MOST_SIMILARITIES", rows * len(bank))
    options = {"k": k, "temperature": temperature, "num_classes": CLASSES}
    found = knn_predict(queries, bank, labels, **options)
    model = classifier(k, temperature)
    expected = model.fit(bank.double().numpy(), labels.numpy()).predict(queries.double().numpy())
    assert found.tolist() == expected.tolist()
    left_out = knn_predict(bank, bank, labels, leave_one_out=True, **options)
    expected = cross_val_predict(model, bank.double().numpy(), labels.numpy(), cv=LeaveOneOut())
    assert left_out.tolist() == expected.tolist()
    if k == 1:  # each feature of the bank is its own nearest neighbour unless left out
        assert torch.equal(knn_predict(bank, bank, labels, **options), labels)
        assert not torch.equal(left_out, labels)


def test_few_neighbours_small_temperatures_and_no_queries():
    bank, labels = clusters(4, 2)
    options = {"num_classes": CLASSES, "temperature": 1e-4}  # exp(1 / 1e-4) overflows
    found = knn_predict(bank, bank, labels, **options)
    assert torch.equal(found, labels)
    assert len(knn_predict(bank, bank, labels, leave_one_out=True, **options)) == 4
    assert knn_predict(bank[:0], bank, labels, **options).shape == (0,)
    half = knn_predict(bank.bfloat16(), bank.bfloat16(), labels, **options)
    assert torch.equal(half, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(2, 3)}, "bank: expected shape"),
        ({"bank_labels": torch.tensor([0, 1, 7, 0])}, "bank_labels: expected class indices"),
        ({"k": 0}, "k: expected >= 1"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"leave_one_out": True}, "leave_one_out: .* same tensor"),
        ({"features": torch.full((2, 8), torch.nan)}, "features: expected finite"),
        ({"bank": torch.zeros(0, 8), "bank_labels": torch.zeros(0, dtype=torch.int64)}, "bank: 0"),
    ],
)
def test_bad_arguments(changes, message):
    bank, labels = clusters(4, 3)
    arguments = {"features": bank[:2], "bank": bank, "bank_labels": labels, "num_classes": CLASSES}
    with pytest.raises(ValueError, match=message):
        knn_predict(**{**arguments, **changes})
