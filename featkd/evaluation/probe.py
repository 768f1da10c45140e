"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.runtime import checks

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Values of a chunk's features or logits: on a CPU few enough for its cache.
_MOST_VALUES = {"cpu": 1 << 20, "cuda": 1 << 24}
_HELD_OUT_EVERY = 10


@dataclass
class LinearProbe:
    """A fitted linear classifier of features.

    Attributes:
        weight: (K, C) weights of the standardised features, float64.
        bias: (K,) biases, float64.
        mean, scale: (C,) of the training features; constant channels have scale 1.
        penalty: penalty of the fit.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    penalty: float

    def predict(self, features: Tensor) -> Tensor:
        """Predicts classes, (N, C) -> (N,) int64."""
        return torch.cat([logits.argmax(1) for logits in self._logits(features)])

    def loss(self, features: Tensor, labels: Tensor) -> float:
        """Mean cross-entropy of features (N, C) with classes (N,)."""
        targets = torch.split(labels, _chunk_size(features, len(self.bias)))
        parts = [
            F.cross_entropy(logits, target, reduction="none").sum(dtype=torch.float64)
            for logits, target in zip(self._logits(features), targets, strict=True)
        ]
        return torch.stack(parts).sum().item() / len(labels)

    def _logits(self, features: Tensor) -> Iterator[Tensor]:
        """Logits (n, K) of one chunk after the other."""
        weight, bias = self.weight.float(), self.bias.float()
        for x in torch.split(features, _chunk_size(features, len(bias))):
            yield _standardised(x, self.mean, self.scale) @ weight.T + bias


def linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    max_iter: int = 500,
) -> LinearProbe:
    """Fits a multinomial logistic regression on standardised features by L-BFGS.

    Minimises the mean cross-entropy plus penalty / 2 times the squared norm of the weights, without
    the biases. It is the objective of scikit-learn's `LogisticRegression` on the output of its
    `StandardScaler`, with C = 1 / (penalty N).

    Of several penalties, the one with the smallest cross-entropy on a tenth of the images, which
    are left out of those fits, is used to fit all images. Accuracies would tie, and rounding of the
    features would then choose.

    Args:
        features: (N, C), floating.
        labels: (N,) int64 class indices, on the same device.
        num_classes: K, number of classes.
        penalties: penalties to choose from.
        seed: seed of the choice of the left-out images.
        max_iter: maximum number of L-BFGS iterations of each fit.

    Raises:
        ValueError: shapes or devices don't match, an argument is out of range, a value is not
            finite, there are fewer than two classes, or too few images to choose a penalty.

    Notes:
        The features are read in chunks, in float32; beside the arguments the fit takes about
        200 MiB at most, and 20 times the size of the weights. Weights and sums are float64.

    Examples:
        >>> features = torch.tensor([[0.0, 1.0], [0.2, 1.1], [1.0, 0.0], [1.2, 0.1]])
        >>> probe = linear_probe(features, torch.tensor([0, 0, 1, 1]), num_classes=2,
        ...                      penalties=[0.01])
        >>> probe.predict(torch.tensor([[0.1, 0.9], [1.0, 0.2]]))
        tensor([0, 1])
    """
    checks.check_floating("features", features, ("N", "C"))
    checks.check_shape("labels", labels, (len(features),))
    checks.check_target("labels", labels, len(features), num_classes)
    checks.check_same_device(features=features, labels=labels)
    if not penalties:
        raise ValueError("penalties: expected one or more, got none")
    for penalty in penalties:
        checks.check_positive("penalties", penalty)
    if num_classes < 2:
        raise ValueError(f"num_classes: expected >= 2, got {num_classes}")
    if not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(f"labels: expected class indices from 0 to {num_classes - 1}")
    if not torch.isfinite(features).all():
        raise ValueError("features: expected finite values")
    least = 1 if len(penalties) == 1 else _HELD_OUT_EVERY
    if len(features) < least:
        raise ValueError(
            f"features: expected {least} or more images to choose a penalty, got {len(features)}"
        )
    chosen = penalties[0]
    if len(penalties) > 1:
        fitted, held_out = _split(labels, seed)
        best, start = math.inf, None
        for penalty in sorted(penalties, reverse=True):
            start = _fit(features, labels, fitted, num_classes, penalty, max_iter, start)
            loss = start.loss(features[held_out], labels[held_out])
            if loss < best:
                best, chosen = loss, penalty
    return _fit(features, labels, None, num_classes, chosen, max_iter, None)


def _split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of nine tenths of the images and of the others, with about equal shares of classes.

    The indices are in ascending order.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    by_class = order[labels[order].argsort(stable=True)]
    held_out = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    held_out[by_class[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def _fit(
    features: Tensor,
    labels: Tensor,
    chosen: Tensor | None,
    num_classes: int,
    penalty: float,
    max_iter: int,
    start: LinearProbe | None,
) -> LinearProbe:
    """Fits the features at the indices `chosen` (None: all), from the weights of `start`."""
    count = len(features) if chosen is None else len(chosen)
    size = _chunk_size(features, num_classes)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, count, size):
            rows = slice(first, first + size) if chosen is None else chosen[first : first + size]
            yield features[rows], labels[rows]

    options: dict[str, Any] = {"dtype": torch.float64, "device": features.device}
    if start is None:
        weight = torch.zeros(num_classes, features.shape[1], **options)
        bias = torch.zeros(num_classes, **options)
        mean, variance = torch.zeros_like(weight[0]), torch.zeros_like(weight[0])
        for x, _ in chunks():
            mean += x.sum(0, dtype=torch.float64) / count
        for x, _ in chunks():
            variance += (x.double() - mean).square().sum(0) / count
        scale = variance.sqrt()
        # The values of a channel that differ by rounding alone are not blown up.
        scale[scale <= 1e-6 * mean.abs()] = 1
        mean, scale = mean.float(), scale.float()
    else:
        mean, scale = start.mean, start.scale
        weight, bias = start.weight.clone(), start.bias.clone()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        """Sets the gradients; returns the objective."""
        total = torch.zeros((), **options)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        narrow_weight, narrow_bias = weight.float(), bias.float()
        for x, target in chunks():
            x = _standardised(x, mean, scale)
            grad = torch.addmm(narrow_bias, x, narrow_weight.T).log_softmax(1)
            total -= grad.gather(1, target[:, None]).sum(dtype=torch.float64)
            grad.exp_().scatter_add_(1, target[:, None], -torch.ones_like(grad[:, :1]))
            grad_weight += grad.T @ x
            grad_bias += grad.sum(0, dtype=torch.float64)
        weight.grad = grad_weight / count + penalty * weight
        bias.grad = grad_bias / count
        return (total / count + penalty / 2 * weight.square().sum()).item()

    with torch.no_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LinearProbe(weight, bias, mean, scale, penalty)


def _standardised(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (x.float() - mean) / scale


def _chunk_size(features: Tensor, num_classes: int) -> int:
    """Number of images of a chunk."""
    return max(1, _MOST_VALUES[features.device.type] // max(features.shape[1], num_classes))
