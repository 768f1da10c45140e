"""Means, paired differences and conclusions of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featkd.compare.arms import ARMS, CONTROL, CONTROLLED, REFERENCE
from featkd.compare.mismatch import MapFigures, TeacherMap, average
from featkd.compare.results import RunResult
from featkd.compare.statistics import Interval, interval
from featkd.runtime.names import plural

NO_MISMATCH = 0.99  # reach from which on there is next to nothing to mend
MISMATCH = 0.90  # reach below which there is a mismatch

_Runs = dict[int, RunResult]  # of one arm, by seed


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
        map: figures of the student's maps, means over the seeds; None if they can't be measured.
    """

    name: str
    top1: Interval
    difference: Interval | None
    parameters: int
    gmacs: float
    images_per_s: float
    map: MapFigures | None


@dataclass(frozen=True)
class Analysis:
    """Findings of a comparison.

    Attributes:
        finding: sentence on the mismatch and on the arms made for it.
        conclusions: sentence on each difference.
        arms: result of each arm, in the order of training.
    """

    finding: str
    conclusions: list[str]
    arms: list[ArmResult]


def analyse(
    names: Sequence[str], runs: Sequence[RunResult], teacher: TeacherMap | None
) -> Analysis:
    """Analyses the runs of the arms `names`, which all have the same seeds."""
    by_arm: dict[str, _Runs] = {name: {} for name in names}
    for run in sorted(runs, key=lambda run: run.seed):
        by_arm[run.name][run.seed] = run
    reference = by_arm[REFERENCE]
    arms = [_arm_result([*own.values()], reference) for own in by_arm.values()]
    pairs = [(own, reference) for name, own in by_arm.items() if name != REFERENCE]
    controlled = None
    if {CONTROL, CONTROLLED} <= {*names}:
        pairs.append((by_arm[CONTROLLED], by_arm[CONTROL]))
        controlled = _difference(*pairs[-1])
    conclusions = [_conclude(*pair) for pair in pairs]
    return Analysis(_find(arms, teacher, controlled), conclusions, arms)


def _arm_result(runs: Sequence[RunResult], reference: _Runs) -> ArmResult:
    name = runs[0].name
    return ArmResult(
        name,
        interval([run.top1 for run in runs]),
        None if name == REFERENCE else _difference({run.seed: run for run in runs}, reference),
        runs[0].parameters,
        runs[0].gmacs,
        sum(run.images_per_s for run in runs) / len(runs),
        average([run.map for run in runs]),
    )


def _difference(own: _Runs, reference: _Runs) -> Interval:
    return interval([run.top1 - reference[seed].top1 for seed, run in own.items()])


def _conclude(own: _Runs, reference: _Runs) -> str:
    """Says in a sentence what a difference between two arms does and doesn't show."""
    found = _difference(own, reference)
    run, other = (next(iter(runs.values())) for runs in (own, reference))
    low, high = found.low, found.high
    side = "above" if found.mean >= 0 else "below"
    text = f"{run.name} is {abs(found.mean):.2f} points {side} {other.name}"
    if low is None or high is None:
        return f"{text} with one seed, which gives no interval: nothing can be concluded."
    seeds = plural(found.count, "paired seed")
    text += f" (95 % interval {low:+.2f} to {high:+.2f}, {seeds}): "
    ratio = run.parameters / other.parameters
    if not found.excludes_zero:
        return f"{text}the interval contains 0, so these seeds do not tell the two apart."
    text += "the interval excludes 0, so the choice of seed alone does not explain it"
    if abs(ratio - 1) > 0.02:
        text += f"; the student's {ratio:.2f} times as many parameters may"
    return f"{text}."


def _find(
    arms: Sequence[ArmResult], teacher: TeacherMap | None, controlled: Interval | None
) -> str:
    """Says in a sentence if there is a mismatch, and if the arms made for one are ahead."""
    (plain,) = (arm for arm in arms if arm.name == REFERENCE)
    premise, expected = _mismatch(plain, teacher)
    tried = [arm for arm in arms if ARMS[arm.name].remedy and arm.difference is not None]
    if not tried:
        return f"{premise}."
    if plain.top1.count == 1:
        return f"{premise}; one seed per arm does not show if a remedy is ahead."
    ahead = [arm for arm in tried if _is_ahead(arm.difference)]
    behind = ", ".join(f"{arm.name} {_signed(arm)}" for arm in tried if arm not in ahead)
    link = "and" if expected is None else "and indeed" if bool(ahead) == expected else "and yet"
    if not ahead:
        return f"{premise}; {link} no remedy is ahead of {REFERENCE} ({behind} points)."
    texts = []
    for arm in ahead:
        text = f"{arm.name} is ahead of {REFERENCE} by {_signed(arm)} points"
        if (ratio := arm.parameters / plain.parameters) > 1.02:
            text += f" with {ratio:.1f} times as many parameters"
        if arm.name == CONTROLLED and controlled is not None:
            if _is_ahead(controlled):
                text += f", and also of {CONTROL}, which has about as many"
            else:
                link = "and"  # for another reason
                text += f", but not of {CONTROL}, which has about as many: its size may explain it"
        texts.append(text)
    if behind:
        texts.append(f"not ahead: {behind} points")
    return f"{premise}; {link} {'; '.join(texts)}."


def _mismatch(plain: ArmResult, teacher: TeacherMap | None) -> tuple[str, bool | None]:
    """Says how much of the teacher the plain student can reach; is a remedy expected to help?"""
    if plain.map is None or teacher is None:
        return "The mismatch could not be measured", None
    width, channels = round(plain.map.width), round(teacher.figures.channels)
    if width >= channels:
        share = f"the student's {width} channels are no fewer than the teacher's"
        return f"No mismatch here: {share}", False
    reach = teacher.reach_of(width)
    share = (
        f"one linear projector for all images, from the student's {width} channels, reaches "
        f"{100 * reach:.1f} % of the energy of the teacher's {channels}"
    )
    if reach >= NO_MISMATCH:
        return f"No mismatch here: {share}, so there is nothing to mend", False
    if reach < MISMATCH:
        return f"A mismatch here: {share}, so there is something to mend", True
    return f"A small mismatch here: {share}", None


def _is_ahead(found: Interval | None) -> bool:
    return found is not None and found.excludes_zero and found.mean > 0


def _signed(arm: ArmResult) -> str:
    return "-" if arm.difference is None else f"{arm.difference.mean:+.2f}"
