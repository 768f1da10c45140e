"""What a row of a cache holds, and how a teacher's outputs become rows and come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Row = Mapping[str, Tensor]
"""What is stored of one image, by column, on the CPU."""

STORES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Taught(NamedTuple):
    """What the teacher says of a batch: logits (B, K) or None, a (B, N, C) map a layer pair."""

    logits: Tensor | None
    maps: list[Tensor]


class NotStorable(ValueError):
    """An image's outputs can't be held in the form asked for.

    Attributes:
        number: of the image in its batch.
        cause: in words.
    """

    def __init__(self, number: int, cause: str) -> None:
        super().__init__(number, cause)
        self.number = number
        self.cause = cause


@dataclass(frozen=True)
class LayerShape:
    """A layer's map: (tokens, channels) an image, in the teacher's dtype, e.g. "float32"."""

    layer: int
    tokens: int
    channels: int
    dtype: str


@dataclass(frozen=True)
class Layout:
    """What each row holds.

    Args:
        classes: K, of the teacher's logits.
        logits_dtype: the teacher's, e.g. "float32".
        logits_top: classes whose log-probabilities are kept, the largest; None keeps all logits as
            they are.
        features: "none" or "full".
        store: what maps are stored in: "fp32", "bf16" or "fp16"; None without maps.
        layers: the maps, in ascending order of their layers.
    """

    classes: int
    logits_dtype: str
    logits_top: int | None
    features: str
    store: str | None
    layers: tuple[LayerShape, ...]

    def encode(self, taught: Taught) -> list[Row]:
        """A batch's outputs as rows.

        Args:
            taught: logits (B, K), and a (B, N, C) map for each of `layers`.

        Raises:
            NotStorable: a value is not finite, or too large for the form.
        """
        assert taught.logits is not None
        columns = self._encode_logits(taught.logits)
        for shape, x in zip(self.layers, taught.maps, strict=True):
            columns[f"features.{shape.layer}"] = _stored(x, shape.layer, self.store)
        held = {name: column.cpu() for name, column in columns.items()}
        return [{name: x[i] for name, x in held.items()} for i in range(len(taught.logits))]

    def decode(
        self, rows: Sequence[Row], layers: Sequence[int], device: torch.device | str = "cpu"
    ) -> Taught:
        """The outputs of some images, in the dtypes in which the teacher gave them.

        Logits of which `logits_top` were kept come as float32 log-probabilities, which are logits
        up to an image's own constant: those classes have theirs, and the rest of the probability
        is spread evenly over the others.

        Args:
            rows: of the images.
            layers: those whose maps are wanted, in any order.
            device: where they go.
        """
        shapes = {shape.layer: shape for shape in self.layers}
        maps = []
        for layer in layers:
            held = _batched(rows, f"features.{layer}", device)
            maps.append(held.to(getattr(torch, shapes[layer].dtype)))
        return Taught(self._decode_logits(rows, device), maps)

    def _encode_logits(self, logits: Tensor) -> dict[str, Tensor]:
        _check_finite(logits, "logits")
        if self.logits_top is None:
            return {"logits": logits}
        # The rest is stored, too: 1 - (the sum of the rounded others) would have no digits left
        # where they are nearly all, and could be negative.
        log_probs = logits.double().log_softmax(1)
        top, classes = log_probs.topk(self.logits_top, dim=1)
        rest = log_probs.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
        kind = torch.int16 if self.classes <= torch.iinfo(torch.int16).max else torch.int32
        return {
            "logits.classes": classes.to(kind),
            "logits.log_probs": torch.cat((top, rest), 1).to(torch.float16),
        }

    def _decode_logits(self, rows: Sequence[Row], device: torch.device | str) -> Tensor:
        if self.logits_top is None:
            return _batched(rows, "logits", device)
        log_probs = _batched(rows, "logits.log_probs", device).float()
        classes = _batched(rows, "logits.classes", device).long()
        others = self.classes - self.logits_top
        full = (log_probs[:, -1:] - math.log(others)).repeat(1, self.classes)
        return full.scatter_(1, classes, log_probs[:, :-1])


def _stored(x: Tensor, layer: int, store: str | None) -> Tensor:
    _check_finite(x, f"the map of layer {layer}")
    held = x if store is None else x.to(STORES[store])
    _check_finite(held, f"the map of layer {layer}, stored as {store},")
    return held


def _check_finite(x: Tensor, what: str) -> None:
    bad = (~x.isfinite()).flatten(1).any(1)
    if bad.any():
        raise NotStorable(int(bad.nonzero()[0]), f"{what} is not finite")


def _batched(rows: Sequence[Row], name: str, device: Any) -> Tensor:
    return torch.stack([row[name] for row in rows]).to(device)
