"""Row kernels compiled ahead of time for every chip, and the rules that they have to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context

from featkd.runtime.names import aligned

from .. import cases
from ..problem import AUTOCAST, Case
from ..results import Measured
from ..sizes import Maps, Sizes
from . import aot
from .chips import CHIPS, REGISTERS, block_registers

# ptxas keeps a few addresses that no loop changes on the stack, in order to fit another block
_MOST_STACK = 32
# forms that are compiled for every dtype pair and chip; the others only for one pair and chip
FORMS = ("mse-lift", "spectral-lift", "two-norms", "indices")
ONE_DTYPE, _ONE_ARCH = "autocast-bf16", 90
_WIDE = Sizes(
    (Maps(1, (14, 14), 768, 1024), Maps(1, (16, 16), 1024, 1280), Maps(1, (37, 37), 384, 1024))
)
_WIDE_FORMS = ("spectral-lift", "two-norms")
_SUMS = "sum_partials"  # loads partial sums, not rows
_EIGHT_PAIRS = "spectral-8pairs"  # launches one kernel eight times


@dataclass(frozen=True)
class Compiled:
    """A kernel of a case, compiled for an architecture."""

    case: str
    kernel: str
    arch: int
    code: aot.Code

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return CHIPS[self.arch].blocks(self.code.registers, self.code.warps, self.code.shared)

    @property
    def broken(self) -> list[str]:
        """Rules of docs/kernels.md that the kernel breaks."""
        code, chip = self.code, CHIPS[self.arch]
        taken = block_registers(code.registers, code.warps)
        checks = {
            f"{taken} registers per block, more than {REGISTERS}": taken > REGISTERS,
            f"{code.stack} bytes of stack": code.stack > _MOST_STACK,
            f"{code.shared} bytes of shared memory, {chip.name} has {chip.shared_bytes}": (
                code.shared > chip.shared_bytes
            ),
            "no 16-byte load": self.kernel != _SUMS and code.aligned and not code.wide_loads,
            f"{code.doubles} float64 instructions": code.doubles,
        }
        return [text for text, broken in checks.items() if broken]

    @property
    def name(self) -> str:
        return f"{self.case}/{self.kernel}"

    def figures(self) -> list[Measured]:
        """Returns the figures in the JSON form."""
        code = self.code
        return [
            (self.name, f"sm_{self.arch}", metric, unit, value)
            for metric, unit, value in (
                ("registers", "count", code.registers),
                ("stack", "bytes", code.stack),
                ("spills", "count", code.spills),
                ("shared", "bytes", code.shared),
                ("blocks", "count", self.blocks),
                ("loads", "count", code.loads),
                ("wide_loads", "count", code.wide_loads),
                ("doubles", "count", code.doubles),
                ("broken_rules", "count", len(self.broken)),
            )
        ]


@dataclass(frozen=True)
class Question:
    """A case by its number among the cases of an op, which a worker process can build anew."""

    op: str
    shapes: str
    dtype: str
    number: int

    @property
    def case(self) -> Case:
        """The case, forward and backward."""
        return _cases(self.op, self.shapes, self.dtype)[self.number]


def _cases(op: str, shapes: str, dtype: str) -> list[Case]:
    if shapes == "wide":
        return [Case(problem, dtype, "both") for problem in cases.OPS[op](_WIDE)]
    return cases.select([op], shapes, [dtype], ["both"])


def questions(ops: Sequence[str], shapes: str, dtypes: Sequence[str]) -> list[Question]:
    """Returns a question for each case whose kernels are not those of another case."""
    return [
        Question(op, shapes, dtype, number)
        for op in ops
        for dtype in dtypes
        if not (op == "soft_kd" and dtype in AUTOCAST)  # logits and gradient have one dtype
        for number, case in enumerate(_cases(op, shapes, dtype))
        if case.problem.form != _EIGHT_PAIRS
    ]


Job = tuple[Question, int, int]
"""Question, number of one of its launches, and architecture."""


def default_jobs(ops: Sequence[str], dtypes: Sequence[str], archs: Sequence[int]) -> list[Job]:
    """Returns all row kernels, dtype pairs and chips at the published widths, others on one chip.

    The others are wider maps, grids of 16 and 37, the metrics without a norm, pooling, and soft
    labels.
    """
    small = questions(ops, "small", dtypes)
    main = [q for q in small if q.case.problem.form in FORMS]
    one = [
        q
        for q in small
        if q not in main and (q.dtype == ONE_DTYPE or (q.op, q.dtype) == ("soft_kd", "bf16"))
    ]
    if ONE_DTYPE in dtypes:
        wide = questions(ops, "wide", [ONE_DTYPE])
        one += [q for q in wide if q.case.problem.form in _WIDE_FORMS]
    others = jobs(one, [_ONE_ARCH] if _ONE_ARCH in archs else [])
    rows = [job for job in others if _recorded(job[0])[job[1]].name != _SUMS]
    return jobs(main, archs) + rows


def jobs(asked: Sequence[Question], archs: Sequence[int]) -> list[Job]:
    """Returns the launches of the cases whose compiled code differs."""
    found: list[Job] = []
    seen = set()
    for question in asked:
        for number, launch in enumerate(_recorded(question)):
            for arch in archs:
                key = (launch.signature, arch)
                if key not in seen:
                    seen.add(key)
                    found.append((question, number, arch))
    return found


@lru_cache(maxsize=4)
def _recorded(question: Question) -> list[aot.Recorded]:
    return aot.record(question.case)


def compile_all(work: Sequence[Job], workers: int) -> Iterator[Compiled]:
    """Compiles the jobs in worker processes; yields the kernels in their order."""
    if not work:
        return
    server = get_context("forkserver")
    server.set_forkserver_preload([__name__])  # imports torch once for all workers
    with ProcessPoolExecutor(workers, server) as pool:
        yield from pool.map(_compile, work)


def _compile(job: Job) -> Compiled:
    question, number, arch = job
    launch = _recorded(question)[number]
    return Compiled(question.case.title, launch.name, arch, aot.compile_for(launch, arch))


def summary(rows: Sequence[Compiled]) -> str:
    """Returns a table of the extremes by kernel and chip."""
    header = ("kernel", "sm", "compiled", "regs", "stack", "blocks", "no 16-byte load")
    groups: dict[tuple[str, int], list[Compiled]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.arch), []).append(row)
    lines = []
    for (kernel, arch), mine in groups.items():
        registers, blocks = [r.code.registers for r in mine], [r.blocks for r in mine]
        narrow = sum(not row.code.wide_loads for row in mine)
        lines.append(
            (
                *(kernel, arch, len(mine), f"{min(registers)} to {max(registers)}"),
                *(max(r.code.stack for r in mine), f"{min(blocks)} to {max(blocks)}", narrow),
            )
        )
    return aligned(header, lines)
