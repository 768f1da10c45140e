"""Options of `featkd cache`: which teacher outputs are stored, and in which form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from featkd.cache.rows import LayerShape, Layout
from featkd.runtime.checks import check_choice, check_shares

DEFAULT_TOP = 10  # classes whose log-probabilities are stored if no maps are
DEFAULT_ENERGY = 0.99

Features = Literal["none", "full", "lowrank"]
Store = Literal["fp32", "bf16", "fp16", "int8"]
_STORES = {"none": (), "full": ("fp32", "bf16", "fp16", "int8"), "lowrank": ("fp16", "int8")}
_DEFAULT_STORE: Store = "int8"  # the most exact for its size (docs/cache-sizes.md)


@dataclass(frozen=True)
class CacheConfig:
    """Selects the teacher outputs that are stored.

    Args:
        views: number of the recipe's epochs whose samples are stored.
        logits_top: number of classes whose log-probabilities are stored in fp16, the largest ones
            of each image, with the sum of the rest; all: the whole logits in the teacher's dtype
            (default: all if feature maps are stored, otherwise 10, or all if there are fewer
            classes).
        features: maps of the teacher's layers in loss.pairs: full maps, the leading singular
            directions of each image's map (lowrank), or none; pooled features are stored whole if
            the loss compares them (default: full if the loss compares maps, otherwise none).
        energy: lowrank: share of each map's energy to store (default: 0.99).
        rank: lowrank: number of directions to store, instead of energy.
        store: storage type of maps: fp16 or int8, with one scale per channel or direction; for
            full maps also fp32 and bf16 (default: int8).
        shard_rows: rows per file, rounded up to whole batches.

    Raises:
        ValueError: a field is out of its range.
    """

    views: int = 1
    logits_top: int | Literal["all"] | None = None
    features: Features | None = None
    energy: float | None = None
    rank: int | None = None
    store: Store | None = None
    shard_rows: int = 1024

    def __post_init__(self) -> None:
        for name in ("views", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if self.features is not None:
            check_choice("features", self.features, get_args(Features))
        if self.energy is not None:
            check_shares("energy", (self.energy,))
            if self.rank is not None:
                raise ValueError(
                    f"energy, rank: expected only one of them, got {self.energy} and {self.rank}"
                )

    def resolved(self, compares_maps: bool) -> CacheConfig:
        """Replaces None by the defaults.

        Args:
            compares_maps: the loss compares feature maps.

        Raises:
            ValueError: an option does not apply to `features`.
        """
        features = self.features or ("full" if compares_maps else "none")
        for name in ("energy", "rank"):
            value = getattr(self, name)
            if value is not None and features != "lowrank":
                raise ValueError(f"{name}: {value} needs features: lowrank, got {features}")
        allowed = _STORES[features]
        if self.store is not None and self.store not in allowed:
            raise ValueError(
                f"store: expected {' or '.join(allowed) or 'nothing'} for features: {features}; "
                f"got {self.store!r}"
            )
        default = DEFAULT_ENERGY if features == "lowrank" and self.rank is None else None
        energy = default if self.energy is None else self.energy
        store = self.store or (_DEFAULT_STORE if allowed else None)
        return replace(self, features=features, energy=energy, store=store)

    def layout(self, classes: int, logits_dtype: str, layers: tuple[LayerShape, ...]) -> Layout:
        """Returns the layout of the rows; the options must be resolved.

        Args:
            classes: number of the teacher's logits.
            logits_dtype: dtype of the teacher's logits, for example "float32".
            layers: shapes of the teacher's maps.

        Raises:
            ValueError: logits_top or rank is out of range for this teacher.
        """
        top = self.logits_top
        if top is None:
            top = min(DEFAULT_TOP, classes) if self.features == "none" else "all"
        if top != "all" and not 1 <= top <= classes:
            raise ValueError(
                f'logits_top: expected 1 to {classes}, the teacher\'s classes, or "all"; got {top}'
            )
        for shape in layers:
            most = min(shape.tokens, shape.channels)
            if self.rank is not None and not shape.is_pooled and not 1 <= self.rank <= most:
                raise ValueError(
                    f"rank: expected 1 to {most}, the lesser of the {shape.tokens} tokens and "
                    f"{shape.channels} channels of layer {shape.layer}; got {self.rank}"
                )
        return Layout(
            classes=classes,
            logits_dtype=logits_dtype,
            logits_top=None if top in ("all", classes) else int(top),
            features=str(self.features),
            energy=self.energy,
            rank=self.rank,
            store=self.store,
            layers=layers,
        )
