"""Layout of a cache's rows; encodes teacher outputs as rows and decodes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from featkd.cache.lowrank import LARGEST, Form, LowRank, compress, dequantise, quantise, restore
from featkd.models.features import POOLED, Layer

Row = Mapping[str, Tensor]
"""Stored columns of one image, on the CPU."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the others have scales
_LEAST_FP16 = torch.finfo(torch.float16).min
_FACTORS = ("left", "left_scales", "right", "right_scales")


class TeacherOutputs(NamedTuple):
    """Teacher outputs for a batch: logits (B, K) or None, and a (B, N, C) map per layer."""

    logits: Tensor | None
    maps: list[Tensor]


class NotStorable(ValueError):
    """The outputs for an image can't be stored.

    Attributes:
        index: index of the image in its batch.
        cause: the reason, in words.
    """

    def __init__(self, index: int, cause: str) -> None:
        super().__init__(index, cause)
        self.index = index
        self.cause = cause


@dataclass(frozen=True)
class LayerShape:
    """Shape (tokens, channels) per image and dtype, for example "float32", of a layer's map.

    The layer "pooled" is the pooled feature, as a map of one token.
    """

    layer: Layer
    tokens: int
    channels: int
    dtype: str

    @property
    def is_pooled(self) -> bool:
        """True for the pooled feature, which rows hold whole and in its dtype."""
        return self.layer == POOLED


@dataclass(frozen=True)
class Layout:
    """Columns of each row.

    Args:
        classes: K, number of the teacher's logits.
        logits_dtype: dtype of the teacher's logits, for example "float32".
        logits_top: number of classes whose log-probabilities are stored, the largest ones; None
            stores all logits.
        features: "none", "full" or "lowrank"; the form of the layers' maps.
        energy, rank: for lowrank: selection of a map's singular directions.
        store: dtype of stored maps, "fp32", "bf16", "fp16" or "int8"; None without maps.
        layers: shapes of the maps, in ascending order of the layers, "pooled" last.
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
        """Columns whose length differs between images; they are stored flat."""
        if self.features != "lowrank":
            return frozenset()
        maps = [x for x in self.layers if not x.is_pooled]
        return frozenset(f"features.{x.layer}.{part}" for x in maps for part in _FACTORS)

    @property
    def most_row_bytes(self) -> int:
        """Upper bound of the bytes of a row's columns."""
        total = 8 * self.classes + 2
        for shape in self.layers:
            tokens, channels = shape.tokens, shape.channels
            values = tokens * channels
            if self.features == "lowrank":
                values = min(tokens, channels) * (tokens + channels + 2)
            total += 8 * (values + channels)  # 8 bytes per value is more than any dtype has
        return total

    def encode(self, outputs: TeacherOutputs) -> list[Row]:
        """Encodes the outputs for a batch as rows.

        Args:
            outputs: logits (B, K), and a (B, N, C) map for each of `layers`.

        Raises:
            NotStorable: a value is not finite.
        """
        assert outputs.logits is not None
        columns: dict[str, Tensor | list[Tensor]] = dict(self._encode_logits(outputs.logits))
        for shape, x in zip(self.layers, outputs.maps, strict=True):
            name = f"features.{shape.layer}"
            what = f"the map of layer {shape.layer}"
            _refuse(~x.isfinite(), f"{what} is not finite")
            if shape.is_pooled:
                columns[name] = _to_host(x)
            elif self.features == "lowrank":
                # A singular value is at most sqrt(N C) times the largest value.
                most = LARGEST / math.sqrt(shape.tokens * shape.channels)
                _refuse(x.abs() > most, f"{what} has values above {most:g}")
                columns |= {f"{name}.{part}": y for part, y in self._encode_factors(x).items()}
            elif self.store in _DTYPES:
                columns[name] = _to_host(_narrow(x, _DTYPES[self.store]))
            else:
                _refuse(x.abs() > LARGEST, f"{what} has values above {LARGEST:g}")
                values, scales = quantise(x, cast(Form, self.store))
                columns[name], columns[f"{name}.scales"] = _to_host(values), _to_host(scales[:, 0])
        if outputs.logits.is_cuda:
            torch.cuda.current_stream(outputs.logits.device).synchronize()  # the copies
        return [{name: x[i] for name, x in columns.items()} for i in range(len(outputs.logits))]

    def decode(
        self,
        rows: Sequence[Row],
        layers: Sequence[Layer],
        device: torch.device | str = "cpu",
    ) -> TeacherOutputs:
        """Decodes rows to outputs in the teacher's dtypes, without waiting for the device.

        With `logits_top`, the logits are float32 log-probabilities. The remaining probability is
        spread evenly over the other classes. Low-rank maps are restored.

        Args:
            rows: one row per image.
            layers: layers whose maps are returned, in any order.
            device: device of the outputs.
        """
        shapes = {shape.layer: shape for shape in self.layers}
        device = torch.device(device)
        maps: list[Tensor] = []
        for layer in layers:
            shape, name = shapes[layer], f"features.{layer}"
            dtype = getattr(torch, shape.dtype)
            if shape.is_pooled or self.store in _DTYPES:
                maps.append(_batched(rows, name, device).to(dtype))
            elif self.features == "lowrank":
                maps.append(restore(_decode_factors(rows, name, shape, device), dtype))
            else:
                scales = _batched(rows, f"{name}.scales", device)[:, None]
                maps.append(dequantise(_batched(rows, name, device), scales, dtype))
        return TeacherOutputs(self._decode_logits(rows, device), maps)

    def _encode_factors(self, x: Tensor) -> dict[str, list[Tensor]]:
        factors, ranks = compress(x, energy=self.energy, rank=self.rank)
        found: dict[str, list[Tensor]] = {}
        for part, factor in zip(("left", "right"), factors, strict=True):
            values, scales = quantise(factor, cast(Form, self.store))
            values, scales = _to_host(values), _to_host(scales)
            kept = list(zip(values, scales, ranks.tolist(), strict=True))
            found[part] = [v[:, :rank] for v, _, rank in kept]
            found[f"{part}_scales"] = [s[0, :rank] for _, s, rank in kept]
        return found

    def _encode_logits(self, logits: Tensor) -> dict[str, Tensor]:
        _refuse(~logits.isfinite(), "logits is not finite")
        if self.logits_top is None:
            return {"logits": _to_host(logits)}
        # The rest is stored as well: 1 minus the rounded others could be negative, and has few
        # digits if they are nearly 1.
        log_probs = logits.double().log_softmax(1)
        top, classes = log_probs.topk(self.logits_top, dim=1)
        rest = log_probs.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
        kind = torch.int16 if self.classes <= torch.iinfo(torch.int16).max else torch.int32
        return {
            "logits.classes": _to_host(classes.to(kind)),
            # A probability below exp(-65504) is zero in any dtype; -inf would make NaN of it.
            "logits.log_probs": _to_host(torch.cat((top, rest), 1).clamp(min=_LEAST_FP16).half()),
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
    """Decodes the factors to float32, with zeros beyond each image's rank."""
    ranks = [len(row[f"{name}.left_scales"]) for row in rows]
    found = []
    for part, length in (("left", shape.tokens), ("right", shape.channels)):
        kind = rows[0][f"{name}.{part}"].dtype
        values = _host_memory((len(rows), length, max(ranks)), kind, device).zero_()
        scales = _host_memory((len(rows), 1, max(ranks)), torch.float32, device).zero_()
        for i, (row, rank) in enumerate(zip(rows, ranks, strict=True)):
            values[i, :, :rank] = row[f"{name}.{part}"].view(length, rank)
            scales[i, 0, :rank] = row[f"{name}.{part}_scales"]
        values, scales = (x.to(device, non_blocking=True) for x in (values, scales))
        found.append(dequantise(values, scales))
    return LowRank(*found)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts finite values; those beyond the dtype's range become its largest, not Inf."""
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def _refuse(bad: Tensor, cause: str) -> None:
    """Raises NotStorable for the first image with a True in `bad`, (B, ...)."""
    if bad.any():
        raise NotStorable(int(bad.flatten(1).any(1).nonzero()[0]), cause)


def _batched(rows: Sequence[Row], name: str, device: torch.device) -> Tensor:
    parts = [row[name] for row in rows]
    held = _host_memory((len(parts), *parts[0].shape), parts[0].dtype, device)
    return torch.stack(parts, out=held).to(device, non_blocking=True)


def _host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised CPU tensor; pinned for a GPU, as other copies wait for the device."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _to_host(x: Tensor) -> Tensor:
    """Copies to the CPU, from a GPU to pinned memory without waiting for the copy."""
    if not x.is_cuda:
        return x
    return _host_memory(x.shape, x.dtype, x.device).copy_(x, non_blocking=True)
