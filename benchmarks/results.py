"""Rows of results: their columns, the CSV file that stores them, and the JSON form."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from featkd.runtime import environment
from featkd.runtime.files import atomic_write, write_csv

_VERSIONS = ("featkd", "python", "torch", "triton")


@dataclass(frozen=True)
class Row:
    """Results of one variant of one case, with the versions and the machine."""

    time: str
    """Start of the run in UTC, equal in all its rows."""
    commit: str
    """Commit of featkd, with "+changes" if source files differ from it."""
    featkd: str
    python: str
    torch: str
    triton: str
    system: str
    processor: str
    instructions: str
    """Vector instructions that torch uses, for instance AVX2."""
    cores: str
    torch_threads: str
    accelerator: str
    """GPU on which the case ran; "none" for the CPU."""
    omp_wait_policy: str
    copy_gb_per_s: float
    """Rate of torch's large copies on this machine, counting read and write."""
    gflop_per_s: float
    """Rate of torch's large matrix products in this dtype."""
    op: str
    form: str
    shape: str
    dtype: str
    direction: str
    variant: str
    backend: str
    """Backend of featkd (triton, cpu, cuda or reference); "torch" for the other variants."""
    load: float
    """Load average of the machine over the last minute, including the case's own threads."""
    rounds: int
    median_ms: float
    q20_ms: float
    q80_ms: float
    speedup: float
    """Median over the rounds of eager's time / this variant's."""
    peak_bytes: int
    """Peak memory above what was allocated before the call."""
    floor_bytes: int
    """Bytes of each input read once and each output written once."""
    flops: int
    """Floating-point operations of the matrix products, without recomputed ones."""
    gb_per_s: float
    """floor_bytes / median."""
    error: float
    """Largest relative L2 error of the outputs (forward) or gradients against eager torch in the
    next wider dtype."""
    roofline_share: float
    """Time of floor_bytes and flops at the machine's own rates / median; above 1 if the data stay
    in a cache."""

    @property
    def case(self) -> str:
        """Name of the case, without the variant."""
        return "/".join((self.op, self.form, self.shape, self.dtype, self.direction))

    @property
    def was_busy(self) -> bool:
        """True if other processes ran beside this case's threads."""
        return self.load > int(self.torch_threads) + 0.5

    @property
    def machine(self) -> dict[str, str]:
        """Properties that must be equal for two times to be comparable."""
        return {name: str(getattr(self, name)) for name in MACHINE}


MACHINE = (
    "system", "processor", "instructions", "cores", "torch_threads", "accelerator",
    "omp_wait_policy",
)  # fmt: skip
COLUMNS = tuple(field.name for field in fields(Row))
_KINDS = {"float": float, "int": int, "str": str}


class ResultsError(ValueError):
    """Raised if a results file cannot be used as requested."""


def describe_run(device: str) -> dict[str, str]:
    """Returns the columns for time, commit, versions and machine."""
    commit = environment.commit() + ("+changes" if environment.has_changes() else "")
    installed = environment.versions()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        **{name: installed[name] for name in _VERSIONS},
        **this_machine(device),
    }


def this_machine(device: str) -> dict[str, str]:
    """Returns the machine and the settings on which times on "cpu" or "cuda" depend."""
    found = environment.machine()
    found["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "default").lower()
    if device == "cpu":
        found["accelerator"] = "none"
    return found


def read(path: Path) -> list[Row]:
    """Reads all rows of a results file, oldest first.

    Raises:
        FileNotFoundError: no such file.
        ResultsError: other columns, no rows, or a value of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results file {path}")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ResultsError(f"{path}: expected the columns {', '.join(COLUMNS)}")
        rows = [_parse(row, path, reader.line_num) for row in reader]
    if not rows:
        raise ResultsError(f"{path}: expected at least one row, got none")
    return rows


def _parse(row: Mapping[str, str | None], path: Path, line: int) -> Row:
    values = {}
    for field in fields(Row):
        text = row[field.name]
        try:
            if text is None:
                raise ValueError
            values[field.name] = _KINDS[str(field.type)](text)
        except ValueError:
            raise ResultsError(
                f"{path}, line {line}: {field.name}: expected {field.type}, got {text!r}"
            ) from None
    return Row(**values)


def newest(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """Returns the last row of each (case, variant), in the order of the file."""
    return {(row.case, row.variant): row for row in rows}


def origin(rows: Iterable[Row]) -> str:
    """Describes machine, versions, commits, days and load of the rows in one line."""
    known = list(rows)

    def several(texts: Iterable[str]) -> str:
        return " and ".join(dict.fromkeys(texts))

    last = known[-1]
    device = last.processor if last.accelerator == "none" else last.accelerator
    loads = sorted(row.load for row in known)
    return (
        f"{device}, {last.instructions}, {last.torch_threads} threads, "
        f"torch {several(r.torch for r in known)}, featkd {several(r.commit[:10] for r in known)}, "
        f"{several(r.time[:10] for r in known)}, load average {loads[0]:.1f} to {loads[-1]:.1f}"
    )


def check_same_machine(path: Path, machine: Mapping[str, str]) -> None:
    """Raises ResultsError if a results file holds rows of another machine."""
    for row in read(path) if path.is_file() else ():
        different = difference(row.machine, machine)
        if different:
            raise ResultsError(
                f"{path} holds results of another machine ({different}): choose another file"
            )


def difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Lists the properties in which two machines differ, like "cores: 2 and 8"; "" for none."""
    return ", ".join(
        f"{name}: {one[name]} and {other[name]}" for name in MACHINE if one[name] != other[name]
    )


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a results file, atomically.

    Raises:
        ResultsError: the file is not a results file, or holds another machine's rows.
    """
    for row in rows[:1]:
        check_same_machine(path, row.machine)
    known = read(path) if path.is_file() else []
    write_csv(path, COLUMNS, map(astuple, [*known, *rows]), digits=6)


Measured = tuple[str, str, str, str, float]
"""(name, variant, metric, unit, value) as in the JSON form."""

_UNITS = {
    "load": "processes", "median_ms": "ms",
    "q20_ms": "ms", "q80_ms": "ms", "speedup": "ratio", "rounds": "count",
    "peak_bytes": "bytes", "floor_bytes": "bytes", "flops": "flop", "gb_per_s": "GB/s",
    "error": "ratio", "roofline_share": "ratio",
}  # fmt: skip


def measured(rows: Iterable[Row]) -> list[Measured]:
    """Returns every figure of the rows in the JSON form."""
    return [
        (row.case, row.variant, metric, unit, getattr(row, metric))
        for row in rows
        for metric, unit in _UNITS.items()
    ]


def write_json(path: Path, meta: Mapping[str, object], rows: Iterable[Measured]) -> None:
    """Writes {"meta": {...}, "rows": [{"name", "variant", "metric", "unit", "value"}, ...]}."""
    names = ("name", "variant", "metric", "unit", "value")
    content = {"meta": dict(meta), "rows": [dict(zip(names, r, strict=True)) for r in rows]}
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def meta_of(run: Mapping[str, str] | Row) -> dict[str, object]:
    """Returns the "meta" of the JSON form for a `describe_run()` or a row."""
    found = asdict(run) if isinstance(run, Row) else run
    return {
        "time": found["time"],
        "commit": found["commit"],
        "versions": {name: found[name] for name in _VERSIONS},
        "machine": {name: found[name] for name in MACHINE},
    }
