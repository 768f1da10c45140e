"""Every op's problems, and the choice of cases among them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from featkd.runtime.suggest import suggestion

from . import (
    lift_head,
    projected_feature_kd,
    soft_kd,
    talking_heads_attention,
    widelast_projection,
)
from .problem import DIRECTIONS, DTYPES, Case, Problem
from .sizes import SETS, Sizes

OPS: dict[str, Callable[[Sizes], list[Problem]]] = {
    "projected_feature_kd": projected_feature_kd.problems,
    "widelast_projection": widelast_projection.problems,
    "lift_head": lift_head.problems,
    "soft_kd": soft_kd.problems,
    "talking_heads_attention": talking_heads_attention.problems,
}
ROW_OPS = ("projected_feature_kd", "widelast_projection", "lift_head", "soft_kd")
"""Ops with Triton kernels."""


def select(
    ops: Sequence[str] = tuple(OPS),
    shapes: str = "small",
    dtypes: Sequence[str] = ("fp32",),
    directions: Sequence[str] = ("forward", "both"),
    batches: Sequence[int] = (),
) -> list[Case]:
    """Returns the cases of the given ops, set of sizes, dtypes and directions.

    Args:
        shapes: name in `SETS`, or "all".
        batches: keeps only problems with these numbers of images; empty for all.

    Raises:
        ValueError: unknown name, or batches that no problem has.
    """
    for name, given, allowed in (
        ("ops", ops, OPS),
        ("shapes", [shapes], (*SETS, "all")),
        ("dtypes", dtypes, DTYPES),
        ("directions", directions, DIRECTIONS),
    ):
        _check_known(name, given, allowed)
    sets = SETS.values() if shapes == "all" else [SETS[shapes]]
    problems = [p for op in dict.fromkeys(ops) for sizes in sets for p in OPS[op](sizes)]
    available = sorted({p.batch for p in problems})
    unknown = sorted(set(batches) - set(available))
    if unknown:
        listed = ", ".join(map(str, available))
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


def _check_known(name: str, given: Sequence[str], allowed: Collection[str]) -> None:
    listed = ", ".join(allowed)
    if not given:
        raise ValueError(f"{name}: expected at least one of {listed}")
    for word in given:
        if word not in allowed:
            raise ValueError(f"{name}: expected {listed}; got {word!r}{suggestion(word, allowed)}")
