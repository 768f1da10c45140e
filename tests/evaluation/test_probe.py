"""Linear probe against scikit-learn's logistic regression, in chunks, with bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from featkd.evaluation import linear_probe, probe

CLASSES = 4


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters in channels of different scales, with a constant channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(9))
    features = centres[labels] + 1.5 * torch.randn(count, 12, generator=generator)
    features = features * torch.logspace(-2, 2, 12) + 30
    features[:, 3] = 0.1
    return features, labels


@pytest.mark.parametrize("chunk", [1 << 24, 50 * 12])
@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_a_fit_is_that_of_scikit_learn(monkeypatch, chunk, penalty):
    monkeypatch.setattr(probe, "_MOST_VALUES", {"cpu": chunk})
    features, labels = clusters(700, 0)
    new, truth = clusters(2000, 1)
    found = linear_probe(features, labels, num_classes=CLASSES, penalties=[penalty])
    scaler = StandardScaler().fit(features.double().numpy())
    model = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-8, max_iter=5000)
    model.fit(scaler.transform(features.double().numpy()), labels.numpy())
    expected = model.predict(scaler.transform(new.double().numpy()))
    accuracies = [np.mean(x == truth.numpy()) for x in (found.predict(new).numpy(), expected)]
    assert abs(accuracies[0] - accuracies[1]) <= 0.001
    assert 0.3 < accuracies[0] < 0.99
    # Biases are not penalised: they are defined up to a common constant.
    bias = found.bias - found.bias.mean()
    np.testing.assert_allclose(found.weight.numpy(), model.coef_, atol=2e-3)
    np.testing.assert_allclose(bias, model.intercept_ - model.intercept_.mean(), atol=2e-3)


def test_the_chosen_penalty_is_best_on_left_out_images():
    features, labels = clusters(60, 2)
    features = torch.cat(
        [features, torch.randn(60, 40, generator=torch.Generator().manual_seed(3))], 1
    )
    grid = (0.3, 10.0, 0.03)
    found = linear_probe(features, labels, num_classes=CLASSES, penalties=grid)
    fitted, held_out = probe._split(labels, 0)
    assert sorted([*fitted.tolist(), *held_out.tolist()]) == [*range(60)]
    assert len(held_out) == 6
    losses = {}
    for penalty in grid:
        scaler = StandardScaler().fit(features[fitted].numpy())
        model = LogisticRegression(C=1 / (penalty * len(fitted)), tol=1e-8, max_iter=5000)
        model.fit(scaler.transform(features[fitted].numpy()), labels[fitted].numpy())
        probabilities = model.predict_proba(scaler.transform(features[held_out].numpy()))
        losses[penalty] = log_loss(labels[held_out].numpy(), probabilities, labels=range(CLASSES))
    assert found.penalty == min(losses, key=losses.__getitem__)
    again = linear_probe(features, labels, num_classes=CLASSES, penalties=[found.penalty])
    assert torch.equal(again.weight, found.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1, 9] * 4)}, "labels: expected class indices from 0 to 3"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: expected shape"),
        ({"features": torch.full((12, 3), torch.nan)}, "features: expected finite"),
        ({"penalties": []}, "penalties: expected one or more"),
        ({"penalties": [0.0]}, "penalties: expected"),
        ({"num_classes": 1}, "num_classes: expected >= 2"),
        ({"features": torch.zeros(3, 3), "labels": torch.tensor([0, 1, 0])}, "10 or more images"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"features": torch.zeros(12, 3), "labels": torch.tensor([0, 1, 2] * 4)}
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**arguments, "num_classes": CLASSES, **changes})
