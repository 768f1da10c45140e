"""Regression check: stored results against new ones of the same machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import results
from .results import Measured, ResultsError, Row

_VARIANT = "featkd"


@dataclass(frozen=True)
class Change:
    """Rows of featkd for one case in both files."""

    old: Row
    new: Row
    tolerance: float

    @property
    def ratio(self) -> float:
        """New median time / old median time."""
        return self.new.median_ms / self.old.median_ms

    @property
    def ratio_to_eager(self) -> float:
        """New time / old time, each relative to eager's time in the same rounds."""
        return self.old.speedup / self.new.speedup

    @property
    def is_slower(self) -> bool:
        """True if the case is slower by three measures, each of which noise alone can exceed.

        The median grew by more than the tolerance, which a busy machine causes as well. The time
        relative to eager grew by as much, which a faster eager causes as well. Four fifths of the
        new times are above four fifths of the old ones, which few scattered rounds are not.
        """
        return (
            min(self.ratio, self.ratio_to_eager) > 1 + self.tolerance
            and self.new.q20_ms > self.old.q80_ms
        )

    @property
    def fell_back(self) -> bool:
        """True if a fused op now runs on the reference."""
        return self.new.backend == "reference" != self.old.backend

    @property
    def holds_more(self) -> bool:
        """True if the peak memory, which has no noise, grew by more than the tolerance."""
        return self.new.peak_bytes > self.old.peak_bytes * (1 + self.tolerance) + 4096

    @property
    def problems(self) -> list[str]:
        """Describes how the case became slower or larger, or fell back to the reference."""
        found = []
        if self.fell_back:
            found.append(f"runs on the reference, ran on {self.old.backend}")
        if self.is_slower:
            busy = [row.load for row in (self.old, self.new) if row.was_busy]
            found.append(
                f"takes {self.new.median_ms:.3g} ms, took {self.old.median_ms:.3g} "
                f"(x {self.ratio:.2f}, x {self.ratio_to_eager:.2f} beside eager)"
                + (f", but at a load of {max(busy):.1f}: measure again" if busy else "")
            )
        if self.holds_more:
            found.append(f"holds {self.new.peak_bytes} bytes, held {self.old.peak_bytes}")
        return found


@dataclass(frozen=True)
class Comparison:
    """Cases in both files, and names of those that only the old file has."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """Describes each case that became worse."""
        return [f"{c.new.case}: {'; '.join(c.problems)}" for c in self.changes if c.problems]

    def measured(self) -> list[Measured]:
        """Returns the figures in the JSON form."""
        return [
            (change.new.case, _VARIANT, metric, unit, value)
            for change in self.changes
            for metric, unit, value in (
                ("time_ratio", "ratio", change.ratio),
                ("time_ratio_to_eager", "ratio", change.ratio_to_eager),
                ("is_slower", "flag", float(change.is_slower)),
                ("fell_back", "flag", float(change.fell_back)),
                ("holds_more", "flag", float(change.holds_more)),
            )
        ]


def compare(old: Path, new: Path, tolerance: float) -> Comparison:
    """Compares featkd's newest rows in `new` with its newest rows in `old`.

    Args:
        tolerance: accepted growth of time and memory, as a fraction.

    Raises:
        ResultsError: the files are of different machines, or have no case in common.
        FileNotFoundError: a file is missing.
    """
    before, after = _newest(old), _newest(new)
    if before and after:
        first, second = (next(iter(rows.values())) for rows in (before, after))
        different = results.difference(first.machine, second.machine)
        if different:
            raise ResultsError(
                f"{old} and {new} are results of different machines ({different}): "
                "compare runs of one machine"
            )
    both = [case for case in before if case in after]
    if not both:
        raise ResultsError(f"{old} and {new} have no case of the {_VARIANT} variant in common")
    return Comparison(
        tuple(Change(before[case], after[case], tolerance) for case in both),
        tuple(case for case in before if case not in after),
    )


def _newest(path: Path) -> dict[str, Row]:
    """Returns featkd's last row of each case; raises if the rows are of different machines."""
    rows = results.newest(results.read(path))
    first = next(iter(rows.values()))
    for row in rows.values():
        different = results.difference(first.machine, row.machine)
        if different:
            raise ResultsError(f"{path}: its rows are of different machines ({different})")
    return {case: row for (case, variant), row in rows.items() if variant == _VARIANT}
