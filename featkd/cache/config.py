"""What is kept of a teacher's outputs: the options of `featkd cache`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from featkd.cache.rows import LayerShape, Layout
from featkd.runtime.checks import check_shares

TOP = 10  # classes whose log-probabilities are kept where nothing else is, unless said otherwise
ENERGY = 0.99

Features = Literal["none", "full", "lowrank"]
Store = Literal["fp32", "bf16", "fp16", "int8"]
_STORES = {"none": (), "full": ("fp32", "bf16", "fp16", "int8"), "lowrank": ("fp16", "int8")}
_STORE: Store = "int8"  # docs/cache-sizes.md: the most exact for its bytes


@dataclass(frozen=True)
class CacheConfig:
    """What is kept of a teacher's outputs.

    Args:
        views: epochs of the recipe whose samples are kept.
        logits_top: so many classes' log-probabilities, the largest ones, and the sum of the rest,
            in fp16; "all" keeps the logits as the teacher gives them, as does the number of its
            classes. None: all beside maps, which take 20 times their bytes; 10 without maps, or
            all where there are no more.
        features: of the teacher's layers in loss.pairs: "full" keeps the maps, "lowrank" each
            image's leading singular directions (`featkd.cache.lowrank.compress`), "none" nothing.
            None: full where the loss compares maps.
        energy: lowrank: the share of each map's energy that is kept. None: 0.99, or what `rank`
            leaves.
        rank: lowrank: a number of directions in place of an energy.
        store: what values are stored in: "fp16" or "int8" with a scale for each channel, or
            direction (`featkd.cache.lowrank.quantise`); full: also "fp32" and "bf16" as they are.
            None: int8.
        shard_rows: rows of a file; rounded up to whole batches.

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
        if self.features is not None and self.features not in get_args(Features):
            raise ValueError(
                f"features: expected one of {', '.join(get_args(Features))}; got {self.features!r}"
            )
        if self.energy is not None:
            check_shares("energy", (self.energy,))
            if self.rank is not None:
                raise ValueError(
                    f"energy, rank: expected one of them, got {self.energy} and {self.rank}"
                )

    def resolved(self, compares_maps: bool) -> CacheConfig:
        """With all defaults of the features' form filled in.

        Args:
            compares_maps: whether the loss does.

        Raises:
            ValueError: an option of another form.
        """
        features = self.features or ("full" if compares_maps else "none")
        for name in ("energy", "rank"):
            value = getattr(self, name)
            if value is not None and features != "lowrank":
                raise ValueError(f"{name}: {value} is for features: lowrank, which are {features}")
        allowed = _STORES[features]
        if self.store is not None and self.store not in allowed:
            raise ValueError(
                f"store: expected {' or '.join(allowed) or 'nothing'} for features: {features}; "
                f"got {self.store!r}"
            )
        energy = self.energy
        if features == "lowrank" and self.rank is None and energy is None:
            energy = ENERGY
        store = self.store if self.store or not allowed else _STORE
        return replace(self, features=features, energy=energy, store=store)

    def layout(self, classes: int, logits_dtype: str, layers: tuple[LayerShape, ...]) -> Layout:
        """The rows of a resolved configuration.

        Args:
            classes, logits_dtype: of the teacher's logits.
            layers: its maps.

        Raises:
            ValueError: logits_top or rank is more than there is.
        """
        top = self.logits_top
        if top is None:
            top = min(TOP, classes) if self.features == "none" else "all"
        if top != "all" and not 1 <= top <= classes:
            raise ValueError(
                f'logits_top: expected 1 to {classes}, the teacher\'s classes, or "all"; got {top}'
            )
        for shape in layers:
            most = min(shape.tokens, shape.channels)
            if self.rank is not None and not 1 <= self.rank <= most:
                raise ValueError(
                    f"rank: expected 1 to {most}, the lesser of the {shape.tokens} tokens and "
                    f"{shape.channels} channels of layer {shape.layer}; got {self.rank}"
                )
        kept: Any = {"features": self.features, "energy": self.energy, "rank": self.rank}
        return Layout(
            classes=classes,
            logits_dtype=logits_dtype,
            logits_top=None if top in ("all", classes) else int(top),
            store=self.store,
            layers=layers,
            **kept,
        )
