"""The report of the compiled kernels: what they use, what they move, and the rules for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context

from . import aot, cases, host, measured, modelled, traffic
from .chips import REGISTERS, block_registers, chip_of
from .problem import AUTOCAST, Case, Maps
from .results import Measured
from .table import aligned

# ptxas keeps a few addresses that no loop changes there, in order to fit another block
_MOST_STACK = 32
# what every dtype pair is compiled for; one pair on one chip stands for the other forms and sizes
_FORMS = ("mse-lift", "spectral-lift", "two-norms", "indices")
_ONE_DTYPE, _ONE_ARCH = "autocast-bf16", 90
_WIDE = (Maps(1, (14, 14), 768, 1024), Maps(1, (16, 16), 1024, 1280), Maps(1, (37, 37), 384, 1024))
_WIDE_FORMS = ("spectral-lift", "two-norms")
_SUMS = "sum_partials"  # reads no rows
_EIGHT_PAIRS = "spectral-8pairs"  # one kernel, eight times


@dataclass(frozen=True)
class Compiled:
    """A kernel of a case on an architecture."""

    case: str
    kernel: str
    arch: int
    code: aot.Code

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return chip_of(self.arch).blocks(self.code.registers, self.code.warps, self.code.shared)

    @property
    def broken(self) -> list[str]:
        """Broken rules of docs/kernels.md."""
        code, chip = self.code, chip_of(self.arch)
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


@dataclass(frozen=True)
class Question:
    """Which of the cases; what a worker process can be told."""

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
        return [
            Case(problem, dtype, "both")
            for maps in _WIDE
            for problem in cases.problems_of(op, maps)
        ]
    return cases.select([op], shapes, [dtype], ["both"])


def questions(ops: Sequence[str], shapes: str, dtypes: Sequence[str]) -> list[Question]:
    """One for each case with kernels; several layer pairs launch the same again and again."""
    return [
        Question(op, shapes, dtype, number)
        for op in ops
        if op in cases.ROW_OPS
        for dtype in dtypes
        if not (op == "soft_kd" and dtype in AUTOCAST)  # logits and gradient have one dtype
        for number, case in enumerate(_cases(op, shapes, dtype))
        if case.problem.form != _EIGHT_PAIRS
    ]


Job = tuple[Question, int, int]
"""A question, the number of one of its launches, and an architecture."""


def default_jobs(ops: Sequence[str], dtypes: Sequence[str], archs: Sequence[int]) -> list[Job]:
    """Every row kernel, dtype pair and chip at the published widths; others on one chip.

    Those are wider maps, grids of 16 and 37, the metrics without a norm, pooling, and soft labels.
    """
    small = questions(ops, "small", dtypes)
    main = [q for q in small if q.case.problem.form in _FORMS]
    one = [q for q in small if q not in main and q.dtype in (_ONE_DTYPE, "bf16")]
    one = [q for q in one if q.dtype == _ONE_DTYPE or q.op == "soft_kd"]
    one += [
        q
        for q in questions(ops, "wide", [_ONE_DTYPE] if _ONE_DTYPE in dtypes else [])
        if q.case.problem.form in _WIDE_FORMS
    ]
    others = jobs(one, [_ONE_ARCH] if _ONE_ARCH in archs else [])
    rows = [job for job in others if _recorded(job[0])[job[1]].name != _SUMS]
    return jobs(main, archs) + rows


def jobs(asked: Sequence[Question], archs: Sequence[int]) -> list[Job]:
    """The launches of the cases that differ in their code."""
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


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes from a server that imports once for all of them."""
    server = get_context("forkserver")
    server.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, server)


def compile_all(
    asked: Sequence[Question] | Sequence[Job], archs: Sequence[int], workers: int
) -> Iterator[Compiled]:
    """The kernels of the cases on the architectures, or of the jobs, as they are compiled."""
    work: list[Job] = []
    for x in asked:
        work += jobs([x], archs) if isinstance(x, Question) else [x]
    if work:
        with _pool(workers) as pool:
            yield from pool.map(_compile, work)


def _compile(job: Job) -> Compiled:
    question, number, arch = job
    launch = _recorded(question)[number]
    return Compiled(_name(question.case), launch.name, arch, aot.compile_for(launch, arch))


def moved(ops: Sequence[str]) -> list[traffic.Traffic]:
    """Counted where the compiled kernels run, added up for two published sizes.

    The emulator's GPU has 4 processors for 8 images, so that a program has as many rows as on 132
    processors with 256 images.
    """
    forms = [x for x in traffic.FORMS if _public(x) in ops]
    found: list[traffic.Traffic] = []
    for form in forms:
        channels = 1000 if form == "soft_kd" else 384
        few = traffic.Rows(form, "bf16", 8, channels=channels, processors=4)
        found += traffic.count(few)
        for dtype in ("bf16", "fp32"):
            for images in (32, 256):
                found += traffic.add_up(traffic.Rows(form, dtype, images, channels=channels))
    return found


def _public(form: str) -> str:
    """The public function of a form of the row ops."""
    names = {"pooled": "lift_head", "two-norms": "widelast_projection", "soft_kd": "soft_kd"}
    return names.get(form, "projected_feature_kd")


def launches(ops: Sequence[str]) -> list[host.Launches]:
    """Launches of the small cases on a GPU, in one dtype and under autocast."""
    asked = questions(ops, "small", ("bf16", _ONE_DTYPE))
    return [
        found
        for q in asked
        if q.case.problem.form in (*_FORMS, "mse")
        for found in host.count(q.case)
    ]


def _name(case: Case) -> str:
    return case.name.rsplit("/", 1)[0]


def compiled_table(rows: Sequence[Compiled]) -> str:
    """Registers, memory and instructions of every kernel."""
    header = ("kernel", "sm", "regs", "stack", "spills", "shared", "blocks", "16-byte", "fp64", "")
    lines = []
    for row in rows:
        code = row.code
        loads = f"{code.wide_loads}/{code.loads}"
        figures = (code.registers, code.stack, code.spills, code.shared, row.blocks, loads)
        verdict = "; ".join(row.broken) or "ok"
        lines.append((f"{row.case} {row.kernel}", row.arch, *figures, code.doubles, verdict))
    return aligned(header, lines)


def summary(rows: Sequence[Compiled]) -> str:
    """The extremes of the table, a line for each kernel and chip."""
    header = ("kernel", "sm", "compiled", "regs", "stack", "blocks", "no 16-byte load")
    lines = []
    for kernel in dict.fromkeys(row.kernel for row in rows):
        for arch in dict.fromkeys(row.arch for row in rows):
            mine = [row for row in rows if (row.kernel, row.arch) == (kernel, arch)]
            if mine:
                registers, stacks = [
                    [getattr(r.code, k) for r in mine] for k in ("registers", "stack")
                ]
                blocks = [row.blocks for row in mine]
                narrow = sum(not row.code.wide_loads for row in mine)
                lines.append(
                    (
                        *(kernel, arch, len(mine), f"{min(registers)} to {max(registers)}"),
                        *(max(stacks), f"{min(blocks)} to {max(blocks)}", narrow),
                    )
                )
    return aligned(header, lines)


def moved_table(rows: Sequence[traffic.Traffic]) -> str:
    """Bytes over the floor."""
    header = ("rows", "direction", "processors", "bytes", "/floor", "")
    lines = [
        (
            *(row.rows.name, row.direction, row.rows.processors, row.moved),
            f"{row.over_floor:.3f}",
            "; ".join(row.broken) or ("counted" if row.counted else "added up"),
        )
        for row in rows
    ]
    return aligned(header, lines)


def launches_table(rows: Sequence[host.Launches]) -> str:
    """Launches of each op on a GPU."""
    header = ("launches", "direction", "featkd's", "products", "other operators of torch")
    lines = []
    for row in rows:
        others = ", ".join(f"{count} {name}" for name, count in row.others.items())
        lines.append((row.case, row.direction, ", ".join(row.kernels), row.products, others))
    return aligned(header, lines)


def host_table(rows: Sequence[host.HostTime]) -> str:
    """Host time beside plain torch's."""
    header = ("host us, launches left out", "featkd", "torch", "ratio", "")
    lines = [
        (
            *(row.op, f"{row.us:.0f}", f"{row.plain_us:.0f}", f"{row.us / row.plain_us:.2f}"),
            "; ".join(row.broken),
        )
        for row in rows
    ]
    return aligned(header, lines)


def modelled_table(rows: Sequence[modelled.Modelled]) -> str:
    """Modelled times of whole ops."""
    header = ("modelled for an H200, not measured: us", "eager", "reference compiled", "featkd")
    lines = [
        (row.case, f"{row.eager:.1f}", f"{row.compiled:.1f}", f"{row.featkd:.1f}") for row in rows
    ]
    return aligned(header, lines)


def measured_table(name: str, rows: Sequence[measured.Timed]) -> str:
    """Microseconds of every launch, measured."""
    lines = [(f"{row.case} {row.kernel}", f"{row.us:.2f}") for row in rows]
    return aligned(("measured: us", name), lines)


def figures(
    compiled: Sequence[Compiled],
    moved: Sequence[traffic.Traffic] = (),
    launched: Sequence[host.Launches] = (),
    hosts: Sequence[host.HostTime] = (),
    models: Sequence[modelled.Modelled] = (),
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
            ("blocks", "count", row.blocks),
            ("loads", "count", code.loads),
            ("wide_loads", "count", code.wide_loads),
            ("doubles", "count", code.doubles),
            ("broken_rules", "count", len(row.broken)),
        ):
            found.append((name, f"sm_{row.arch}", metric, unit, value))
    for part in moved:
        how = "sm_80 counted" if part.counted else "added up"
        name = f"{part.rows.name}/{part.direction}"
        found.append((name, how, "moved", "bytes", part.moved))
        found.append((name, how, "over_floor", "ratio", part.over_floor))
    for launch in launched:
        name = f"{launch.case}/{launch.direction}"
        found.append((name, "featkd", "kernels", "count", len(launch.kernels)))
        found.append((name, "torch", "products", "count", launch.products))
        found.append((name, "torch", "others", "count", sum(launch.others.values())))
    for call in hosts:
        found.append((call.op, "featkd", "host", "us", call.us))
        found.append((call.op, "torch", "host", "us", call.plain_us))
    for model in models:
        for form in ("eager", "compiled", "featkd"):
            variant = f"{form} modelled, not measured"
            found.append((model.case, variant, "time", "us", getattr(model, form)))
    for timing in timed:
        kernel = f"{timing.case}/{timing.kernel}"
        found.append((kernel, f"{device} measured", "time", "us", timing.us))
    return found
