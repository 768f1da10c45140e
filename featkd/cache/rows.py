"""What a row of a cache holds, and how a teacher's outputs become rows and come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from featkd.cache.lowrank import Form, LowRank, compress, dequantise, quantise, restore

Row = Mapping[str, Tensor]
"""What is stored of one image, by column, on the CPU."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the others have scales
_PARTS = ("left", "left_scales", "right", "right_scales")


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
        features: "none", "full" or "lowrank".
        energy, rank: lowrank: which of a map's singular directions are kept.
        store: what values are stored in, "fp32", "bf16", "fp16" or "int8"; None without maps.
        layers: the maps, in ascending order of their layers.
    """

    classes: int
    logits_dtype: str
    logits_top: int | None
    features: str
    energy: float | None
    rank: int | None
    store: str | None
    layers: tuple[LayerShape, ...]

    @property
    def varying(self) -> frozenset[str]:
        """The columns whose rows differ in length, by image: they are stored flat."""
        if self.features != "lowrank":
            return frozenset()
        return frozenset(f"features.{x.layer}.{part}" for x in self.layers for part in _PARTS)

    def encode(self, taught: Taught) -> list[Row]:
        """A batch's outputs as rows.

        Args:
            taught: logits (B, K), and a (B, N, C) map for each of `layers`.

        Raises:
            NotStorable: a value is not finite.
        """
        assert taught.logits is not None
        columns: dict[str, Tensor | list[Tensor]] = dict(self._encode_logits(taught.logits))
        for shape, x in zip(self.layers, taught.maps, strict=True):
            name = f"features.{shape.layer}"
            _check_finite(x, f"the map of layer {shape.layer}")
            if self.features == "lowrank":
                columns |= {f"{name}.{part}": y for part, y in self._encode_factors(x).items()}
                continue
            if self.store in _DTYPES:
                columns[name] = x.to(_DTYPES[self.store]).cpu()
                continue
            values, scales = quantise(x, cast(Form, self.store))
            columns[name], columns[f"{name}.scales"] = values.cpu(), scales[:, 0].cpu()
        return [{name: x[i] for name, x in columns.items()} for i in range(len(taught.logits))]

    def decode(
        self, rows: Sequence[Row], layers: Sequence[int], device: torch.device | str = "cpu"
    ) -> Taught:
        """The outputs of some images, in the dtypes in which the teacher gave them.

        Logits of which `logits_top` were kept come as float32 log-probabilities, which are logits
        up to an image's own constant: those classes have theirs, and the rest of the probability
        is spread evenly over the others. Low-rank maps are restored. Nothing waits for the device.

        Args:
            rows: of the images.
            layers: those whose maps are wanted, in any order.
            device: where they go.
        """
        shapes = {shape.layer: shape for shape in self.layers}
        device = torch.device(device)
        maps: list[Tensor] = []
        for layer in layers:
            name, dtype = f"features.{layer}", getattr(torch, shapes[layer].dtype)
            if self.features == "lowrank":
                factors = _decode_factors(rows, name, shapes[layer], device)
                maps.append(restore(factors, dtype))
                continue
            held = _batched(rows, name, device)
            if self.store in _DTYPES:
                maps.append(held.to(dtype))
            else:
                scales = _batched(rows, f"{name}.scales", device)
                maps.append(dequantise(held, scales[:, None], dtype))
        return Taught(self._decode_logits(rows, device), maps)

    def _encode_factors(self, x: Tensor) -> dict[str, list[Tensor]]:
        factors, ranks = compress(x, energy=self.energy, rank=self.rank)
        found: dict[str, list[Tensor]] = {}
        for part, factor in zip(("left", "right"), factors, strict=True):
            values, scales = quantise(factor, cast(Form, self.store))
            kept = list(zip(values.cpu(), scales.cpu(), ranks.tolist(), strict=True))
            found[part] = [v[:, :rank] for v, _, rank in kept]
            found[f"{part}_scales"] = [s[0, :rank] for _, s, rank in kept]
        return found

    def _encode_logits(self, logits: Tensor) -> dict[str, Tensor]:
        _check_finite(logits, "logits")
        if self.logits_top is None:
            return {"logits": logits.cpu()}
        # The rest is stored, too: 1 - (the sum of the rounded others) would have no digits left
        # where they are nearly all, and could be negative.
        log_probs = logits.double().log_softmax(1)
        top, classes = log_probs.topk(self.logits_top, dim=1)
        rest = log_probs.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
        kind = torch.int16 if self.classes <= torch.iinfo(torch.int16).max else torch.int32
        return {
            "logits.classes": classes.to(kind).cpu(),
            "logits.log_probs": torch.cat((top, rest), 1).to(torch.float16).cpu(),
        }

    def _decode_logits(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        if self.logits_top is None:
            return _batched(rows, "logits", device)
        log_probs = _batched(rows, "logits.log_probs", device).float()
        classes = _batched(rows, "logits.classes", device).long()
        others = self.classes - self.logits_top
        full = (log_probs[:, -1:] - math.log(others)).repeat(1, self.classes)
        return full.scatter_(1, classes, log_probs[:, :-1])


def _decode_factors(
    rows: Sequence[Row], name: str, shape: LayerShape, device: torch.device
) -> LowRank:
    """The factors in float32, with zeros beyond each image's rank."""
    ranks = [len(row[f"{name}.left_scales"]) for row in rows]
    found = []
    for part, length in (("left", shape.tokens), ("right", shape.channels)):
        kind = rows[0][f"{name}.{part}"].dtype
        values = _host_memory((len(rows), length, max(ranks)), kind, device).zero_()
        scales = _host_memory((len(rows), 1, max(ranks)), torch.float32, device).zero_()
        for i, (row, rank) in enumerate(zip(rows, ranks, strict=True)):
            values[i, :, :rank] = row[f"{name}.{part}"].view(length, rank)
            scales[i, 0, :rank] = row[f"{name}.{part}_scales"]
        found.append(dequantise(_moved(values, device), _moved(scales, device)))
    return LowRank(*found)


def _check_finite(x: Tensor, what: str) -> None:
    bad = (~x.isfinite()).flatten(1).any(1)
    if bad.any():
        raise NotStorable(int(bad.nonzero()[0]), f"{what} is not finite")


def _batched(rows: Sequence[Row], name: str, device: torch.device) -> Tensor:
    parts = [row[name] for row in rows]
    held = _host_memory((len(parts), *parts[0].shape), parts[0].dtype, device)
    return _moved(torch.stack(parts, out=held), device)


def _host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, pinned for a GPU: a copy from other memory waits for the device."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, non_blocking=device.type == "cuda")
