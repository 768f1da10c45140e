"""The rules that compiled kernels are held to, and the report of what they are and move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from . import aot, cases, measured, traffic
from .chips import CHIPS, chip_of, modelled_us
from .problem import Case
from .results import Measured
from .table import aligned

# bytes over the floor: loss and dS in one launch, all launches together, one forward launch
_FIRST_LAUNCH = {"projected_feature_kd": 1.25, "widelast_projection": 1.1}
_ALL_LAUNCHES = {"projected_feature_kd": 2.5}
# of the narrow set, for time: where tiles of the published widths have spilled or loaded too little
_NARROW = (
    ("widelast_projection", "fp32"),
    ("widelast_projection", "bf16"),
    ("lift_head", "fp32"),
    ("projected_feature_kd", "bf16"),
)
_NARROW_FORMS = ("two-norms", "spectral", "spectral-lift")


@dataclass(frozen=True)
class Compiled:
    """A kernel of a case on an architecture."""

    case: str
    kernel: str
    arch: int
    code: aot.Code

    @property
    def broken(self) -> list[str]:
        """Rules of docs/kernels.md that it breaks."""
        code, chip = self.code, chip_of(self.arch)
        checks = {
            f"spills: {code.stack} bytes of stack, {code.spills} accesses": (
                code.stack or code.spills
            ),
            f"{code.shared} bytes of shared memory, {chip.name} has {chip.shared_bytes}": (
                code.shared > chip.shared_bytes
            ),
            "multiplies matrices without tensor cores": code.products and not code.tensor_core,
            "no 16-byte load": code.aligned and not code.wide_loads,
            f"{code.doubles} float64 instructions": code.doubles,
        }
        return [text for text, broken in checks.items() if broken]


@dataclass(frozen=True)
class Moved:
    """What a case's launches moved when their sm_80 PTX ran on the CPU."""

    case: str
    op: str
    launches: list[traffic.Traffic]
    over_floor: float
    """Of all launches together."""
    least_flops: int
    """Of the matrix products that the forward pass cannot avoid; at least 1."""

    @property
    def broken(self) -> list[str]:
        """Rules of docs/kernels.md that it breaks."""
        first = self.launches[0].moved / self.launches[0].floor
        found = []
        if first > _FIRST_LAUNCH.get(self.op, first):
            found.append(f"first launch moves {first:.2f} x the floor")
        if self.over_floor > _ALL_LAUNCHES.get(self.op, self.over_floor):
            found.append(f"all launches move {self.over_floor:.2f} x the floor")
        return found


@dataclass(frozen=True)
class Question:
    """Which of the cases; what a worker process can be told."""

    op: str
    shapes: str
    dtype: str
    number: int

    @property
    def case(self) -> Case:
        """The case: forward and, where there is one, backward pass."""
        return _whole(self.op, self.shapes, self.dtype)[self.number]


def _whole(op: str, shapes: str, dtype: str) -> list[Case]:
    """An op's cases in the direction that has the most launches."""
    both = cases.select([op], shapes, [dtype], ["both"])
    return both or cases.select([op], shapes, [dtype], ["forward"])


def questions(ops: Sequence[str], shapes: str, dtypes: Sequence[str]) -> list[Question]:
    """One for each case; those of several layer pairs launch the same kernels again and again."""
    return [
        Question(op, shapes, dtype, number)
        for op in ops
        for dtype in dtypes
        if shapes != "narrow" or (op, dtype) in _NARROW
        for number, case in enumerate(_whole(op, shapes, dtype))
        if "pairs" not in case.problem.form
        if shapes != "narrow" or case.problem.form in _NARROW_FORMS
    ]


def counted(ops: Sequence[str], dtypes: Sequence[str]) -> list[Question]:
    """The cases whose traffic is counted: the small ones, for time; the published 32 images where
    the rule is about all launches, as W and partial sums weigh more in fewer."""
    many = [op for op in ops if op in _ALL_LAUNCHES]
    published = questions(many, "published", dtypes)
    fewest = min((q.case.problem.batch for q in published), default=0)
    small = questions([op for op in ops if op not in many], "small", dtypes)
    return [q for q in published if q.case.problem.batch == fewest] + small


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes from a server that imports once for all of them."""
    server = get_context("forkserver")
    server.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, server)


def compile_all(
    asked: Sequence[Question], archs: Sequence[int], workers: int
) -> Iterator[Compiled]:
    """Every kernel of the cases on every architecture, as they are compiled."""
    with _pool(workers) as pool:
        jobs = [(question, arch) for question in asked for arch in archs]
        for found in pool.map(_compile, *zip(*jobs, strict=True)):
            yield from found


def _compile(question: Question, arch: int) -> list[Compiled]:
    name = _name(question.case)
    return [
        Compiled(name, launch.name, arch, aot.compile_for(launch, arch))
        for launch in aot.record(question.case, arch)
    ]


def count_all(asked: Sequence[Question], workers: int) -> Iterator[Moved]:
    """The traffic of the cases, as they are counted."""
    with _pool(workers) as pool:
        yield from pool.map(_count, asked)


def _count(question: Question) -> Moved:
    case = question.case
    launches = traffic.count(case)
    over = traffic.over_floor(launches)
    least = max(2 * case.problem.multiply_adds, 1)
    return Moved(_name(case), case.problem.op, launches, over, least)


def _name(case: Case) -> str:
    return case.name.rsplit("/", 1)[0]


def compiled_table(rows: Sequence[Compiled]) -> str:
    """Registers, memory and instructions of every kernel."""
    header = ("kernel", "sm", "regs", "stack", "spills", "shared", "tensor", "16-byte", "fp64", "")
    lines = []
    for row in rows:
        code = row.code
        loads = f"{code.wide_loads}/{code.loads}"
        tensor = f"{code.tensor_core} {code.instructions}".rstrip()
        figures = (code.registers, code.stack, code.spills, code.shared, tensor, loads)
        verdict = "; ".join(row.broken) or "ok"
        name = f"{row.case} {row.kernel}"
        lines.append((name, row.arch, *figures, code.doubles, verdict))
    return aligned(header, lines)


def moved_table(rows: Sequence[Moved]) -> str:
    """Bytes over the floor, coalescing, conflicts and flops of every launch."""
    header = (
        "kernel", "read", "written", "/floor", "L2 read/floor", "asked/sectors", "conflicts",
        "products/projection", "",
    )  # fmt: skip
    lines: list[tuple[object, ...]] = []
    for row in rows:
        for launch in row.launches:
            c = launch.counters
            figures = (
                c.distinct_read_bytes,
                c.distinct_write_bytes,
                f"{launch.moved / launch.floor:.2f}",
                f"{32 * c.global_read_sectors / launch.floor:.1f}",
                f"{c.read_efficiency:.2f} {c.write_efficiency:.2f}",
                f"{c.shared_conflicts / max(c.shared_wavefronts, 1):.2f}",
                f"{products(c.flops) / row.least_flops:.2f}" if products(c.flops) else "",
            )
            lines.append((f"{row.case} {launch.name}", *figures, ""))
        verdict = "; ".join(row.broken) or "ok"
        lines.append(
            (f"{row.case} together", "", "", f"{row.over_floor:.2f}", "", "", "", "", verdict)
        )
    return aligned(header, lines)


def products(flops: dict[str, int]) -> int:
    """Flops of the tensor cores."""
    return sum(count for kind, count in flops.items() if kind.startswith("mma."))


def modelled_table(rows: Sequence[Moved]) -> str:
    """Least microseconds by the data sheets."""
    header = ("modelled, not measured: us", *(chip.name for chip in CHIPS))
    lines = [
        (
            f"{row.case} {launch.name}",
            *(f"{modelled_us(c, launch.moved, launch.counters.flops):.2f}" for c in CHIPS),
        )
        for row in rows
        for launch in row.launches
    ]
    return aligned(header, lines)


def measured_table(name: str, rows: Sequence[measured.Timed]) -> str:
    """Microseconds of every launch, measured."""
    lines = [(f"{row.case} {row.kernel}", f"{row.us:.2f}") for row in rows]
    return aligned(("measured: us", name), lines)


def figures(
    compiled: Sequence[Compiled],
    moved: Sequence[Moved],
    device: str = "",
    timed: Sequence[measured.Timed] = (),
) -> list[Measured]:
    """Every figure as (name, variant, metric, unit, value); `timed` are of the GPU `device`."""
    found: list[Measured] = []
    for row in compiled:
        code, name = row.code, f"{row.case}/{row.kernel}"
        for metric, unit, value in (
            ("registers", "count", code.registers),
            ("stack", "bytes", code.stack),
            ("spills", "count", code.spills),
            ("shared", "bytes", code.shared),
            ("tensor_core", "count", code.tensor_core),
            ("loads", "count", code.loads),
            ("wide_loads", "count", code.wide_loads),
            ("doubles", "count", code.doubles),
            ("broken_rules", "count", len(row.broken)),
        ):
            found.append((name, f"sm_{row.arch}", metric, unit, value))
    for case in moved:
        for launch in case.launches:
            c, name = launch.counters, f"{case.case}/{launch.name}"
            for metric, unit, number in (
                ("read", "bytes", c.distinct_read_bytes),
                ("written", "bytes", c.distinct_write_bytes),
                ("read_sectors", "count", c.global_read_sectors),
                ("written_sectors", "count", c.global_write_sectors),
                ("floor", "bytes", launch.floor),
                ("over_floor", "ratio", launch.moved / launch.floor),
                ("read_efficiency", "ratio", c.read_efficiency),
                ("write_efficiency", "ratio", c.write_efficiency),
                ("bank_conflicts", "count", c.shared_conflicts),
                ("shared_wavefronts", "count", c.shared_wavefronts),
            ):
                found.append((name, "sm_80 counted", metric, unit, number))
            for chip in CHIPS:
                time = modelled_us(chip, launch.moved, c.flops)
                found.append((name, f"{chip.name} modelled, not measured", "time", "us", time))
        found.append((case.case, "sm_80 counted", "over_floor", "ratio", case.over_floor))
    for timing in timed:
        kernel = f"{timing.case}/{timing.kernel}"
        found.append((kernel, f"{device} measured", "time", "us", timing.us))
    return found
