"""Weighted k-nearest-neighbour classification of features, as in DINO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.runtime import checks

_MOST_SIMILARITIES = 1 << 24  # at a time: 64 MiB of float32


def knn_predict(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
    leave_one_out: bool = False,
) -> Tensor:
    """Predicts the classes of features from the labels of their nearest neighbours in a bank.

    The k neighbours of largest cosine similarity s vote for their classes, each with weight
    exp(s / temperature). The class with the most votes is predicted.

    Args:
        features: (N, C), floating.
        bank: (M, C), floating, on the same device.
        bank_labels: (M,) int64 class indices of the bank.
        k: number of neighbours; all if the bank holds fewer.
        temperature: temperature of the votes.
        num_classes: K, number of classes.
        leave_one_out: `features` is `bank`, and no feature is its own neighbour.

    Returns:
        (N,) int64 class indices.

    Raises:
        ValueError: shapes or devices don't match, an argument is out of range, a value is not
            finite, or there is no neighbour.

    Notes:
        Computed in float32, in chunks: beside the arguments and their normalised copies it takes
        about 200 MiB at most, or one row of M similarities.

    Examples:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_predict(torch.tensor([[2.0, 1.0]]), bank, torch.tensor([1, 1, 0]), num_classes=2)
        tensor([1])
    """
    checks.check_floating("features", features, ("N", "C"))
    checks.check_floating("bank", bank, ("M", features.shape[1]))
    checks.check_shape("bank_labels", bank_labels, (len(bank),))
    checks.check_target("bank_labels", bank_labels, len(bank), num_classes)
    checks.check_same_device(features=features, bank=bank, bank_labels=bank_labels)
    checks.check_positive("temperature", temperature)
    if k < 1:
        raise ValueError(f"k: expected >= 1, got {k}")
    if leave_one_out and features.shape != bank.shape:
        raise ValueError(
            f"leave_one_out: features and bank must be the same tensor, got shapes "
            f"{tuple(features.shape)} and {tuple(bank.shape)}"
        )
    if len(bank) <= leave_one_out:
        raise ValueError(f"bank: {len(bank)} features leave no neighbour")
    for name, x in (("features", features), ("bank", bank)):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name}: expected finite values")
    if not ((bank_labels >= 0) & (bank_labels < num_classes)).all():
        raise ValueError(f"bank_labels: expected class indices from 0 to {num_classes - 1}")
    queries, keys = F.normalize(features.float()), F.normalize(bank.float())
    neighbours = min(k, len(bank) - leave_one_out)
    rows = max(1, _MOST_SIMILARITIES // max(len(bank), num_classes))
    predicted = []
    for first in range(0, len(queries), rows):
        similarity = queries[first : first + rows] @ keys.T
        if leave_one_out:
            similarity.diagonal(first).fill_(-torch.inf)
        top, index = similarity.topk(neighbours)
        votes = similarity.new_zeros(len(similarity), num_classes)
        # Relative to the nearest neighbour, so that no weight overflows.
        weights = ((top - top[:, :1]) / temperature).exp()
        predicted.append(votes.scatter_add_(1, bank_labels[index], weights).argmax(1))
    return torch.cat(predicted) if predicted else bank_labels.new_empty(0)
