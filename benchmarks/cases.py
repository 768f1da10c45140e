"""All that can be timed, and the choice among it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from featkd.runtime.checks import suggestion

from . import (
    lift_head,
    projected_feature_kd,
    sizes,
    soft_kd,
    talking_heads_attention,
    widelast_projection,
)
from .problem import DIRECTIONS, DTYPES, Case, Maps, Problem

OPS: dict[str, Callable[[str], list[Problem]]] = {
    "projected_feature_kd": projected_feature_kd.problems,
    "widelast_projection": widelast_projection.problems,
    "lift_head": lift_head.problems,
    "soft_kd": soft_kd.problems,
    "talking_heads_attention": talking_heads_attention.problems,
}
ROW_OPS = ("projected_feature_kd", "widelast_projection", "lift_head", "soft_kd")
"""Those that have kernels in Triton."""


def select(
    ops: Sequence[str] = tuple(OPS),
    shapes: str = "small",
    dtypes: Sequence[str] = ("fp32",),
    directions: Sequence[str] = ("forward", "both"),
    batches: Sequence[int] = (),
) -> list[Case]:
    """The cases of the given ops, set of sizes ("all" for every set), dtypes and directions.

    Args:
        batches: only problems of these numbers of images; empty for all.

    Raises:
        ValueError: an unknown name, or batches that no problem has.
    """
    for name, given, allowed in (
        ("ops", ops, OPS),
        ("shapes", [shapes], (*sizes.SETS, "all")),
        ("dtypes", dtypes, DTYPES),
        ("directions", directions, DIRECTIONS),
    ):
        check_known(name, given, allowed)
    sets = sizes.SETS if shapes == "all" else (shapes,)
    problems = [p for op in dict.fromkeys(ops) for name in sets for p in OPS[op](name)]
    there = sorted({p.batch for p in problems})
    unknown = sorted(set(batches) - set(there))
    if unknown:
        listed = ", ".join(map(str, there))
        raise ValueError(f"batches: the chosen problems have {listed} images; got {unknown[0]}")
    return [
        Case(problem, dtype, direction)
        for problem in problems
        if not batches or problem.batch in batches
        for dtype in DTYPES
        if dtype in dtypes
        for direction in (DIRECTIONS if problem.differentiable else ("forward",))
        if direction in directions
    ]


def problems_of(op: str, maps: Maps, logits: tuple[tuple[int, int], ...] = ()) -> list[Problem]:
    """An op's problems on one pair of feature maps, and on (images, classes) of logits."""
    name = f"one {maps}"
    sizes.MAPS[name], sizes.LOGITS[name] = (maps,), logits
    return OPS[op](name)


def check_known(name: str, given: Sequence[str], allowed: Collection[str]) -> None:
    """Raise ValueError for a word that is not among the allowed ones, or for none at all."""
    listed = ", ".join(allowed)
    if not given:
        raise ValueError(f"{name}: expected at least one of {listed}")
    for word in given:
        if word not in allowed:
            raise ValueError(f"{name}: expected {listed}; got {word!r}{suggestion(word, allowed)}")
