"""Means, paired differences and conclusions of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featkd.compare.arms import REFERENCE
from featkd.compare.results import RunResult
from featkd.compare.statistics import Interval, interval
from featkd.runtime.names import plural


@dataclass(frozen=True)
class ArmResult:
    """Result of one arm over its seeds.

    Attributes:
        name: the arm.
        top1: validation accuracy in per cent.
        difference: accuracy minus that of the reference arm, paired by seed; None for the
            reference.
        parameters: number of parameters of the student, without projectors.
        gmacs: billions of multiply-adds of one image's forward pass.
        images_per_s: mean training throughput.
        conclusion: sentence on the difference; empty for the reference.
    """

    name: str
    top1: Interval
    difference: Interval | None
    parameters: int
    gmacs: float
    images_per_s: float
    conclusion: str


def analyse(arms: Sequence[str], runs: Sequence[RunResult]) -> list[ArmResult]:
    """Computes the result of each arm, in the order of `arms`; all have the same seeds."""
    by_arm = {
        name: {run.seed: run for run in sorted(runs, key=lambda r: r.seed) if run.name == name}
        for name in arms
    }
    reference = by_arm[REFERENCE]
    found = []
    for name, own in by_arm.items():
        first = next(iter(own.values()))
        difference, conclusion = None, ""
        if name != REFERENCE:
            pairs = [run.top1 - reference[seed].top1 for seed, run in own.items()]
            difference = interval(pairs)
            conclusion = conclude(name, difference, first.parameters, reference[first.seed])
        found.append(
            ArmResult(
                name,
                interval([run.top1 for run in own.values()]),
                difference,
                first.parameters,
                first.gmacs,
                sum(run.images_per_s for run in own.values()) / len(own),
                conclusion,
            )
        )
    return found


def conclude(name: str, difference: Interval, parameters: int, reference: RunResult) -> str:
    """Says in a sentence what a difference to the reference arm does and doesn't show."""
    low, high = difference.low, difference.high
    side = "above" if difference.mean >= 0 else "below"
    text = f"{name} is {abs(difference.mean):.2f} points {side} {REFERENCE}"
    if low is None or high is None:
        return f"{text} with one seed, which gives no interval: nothing can be concluded."
    seeds = plural(difference.count, "paired seed")
    text += f" (95 % interval {low:+.2f} to {high:+.2f}, {seeds}): "
    ratio = parameters / reference.parameters
    if not difference.excludes_zero:
        return f"{text}the interval contains 0, so these seeds do not tell the two apart."
    text += "the interval excludes 0, so the choice of seed alone does not explain it"
    if abs(ratio - 1) > 0.02:
        text += f"; the student's {ratio:.2f} times as many parameters may"
    return f"{text}."
