"""`featkd kernels report`: compile, count, check, and write down."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featkd.arguments import Parser, add_json, check_folders, several
from featkd.checks import suggestion
from featkd.files import write_csv

if TYPE_CHECKING:
    from . import csrc_kernels

_HELP = """\
usage: featkd kernels report [arguments]      featkd kernels report --help

  report   compile every kernel for sm_80, sm_90 and sm_100, count its traffic, check the rules,
           and measure it where there is a GPU
"""


def kernels(words: Sequence[str]) -> int:
    """Run `featkd kernels ...`; the exit code is 1 where a rule is broken.

    Raises:
        ValueError: bad arguments.
        FileNotFoundError: no folder to write a file in.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if words else 2
    if words[0] != "report":
        near = suggestion(words[0], ["report"])
        raise ValueError(f"kernels: expected report; got {words[0]!r}{near}")
    return _report(list(words[1:]))


def _report(words: list[str]) -> int:
    import torch

    from . import cases, chips, csrc_counts, csrc_kernels, measured, report, results, sizes, table
    from .problem import DTYPES

    archs = [str(chip.arch) for chip in chips.CHIPS]
    ops = (*cases.OPS, "spectrum")
    description = " ".join(_HELP.split("report   ")[1].split())
    parser = Parser(prog="featkd kernels report", description=description)
    several(parser, "ops", ops, ops)
    several(parser, "dtypes", tuple(DTYPES), tuple(DTYPES))
    several(parser, "archs", archs, archs)
    several(parser, "shapes", sizes.SETS, ("small", "narrow"))
    several(parser, "count", ("none", *DTYPES), ("bf16",))
    parser.add_argument("--csv", type=str, default=None, metavar="FILE", help="figures as CSV")
    add_json(parser)
    options = parser.parse_args(words)
    check_folders(options, ("csv", "json"))
    for name, given, allowed in (
        ("--ops", options.ops, ops),
        ("--dtypes", options.dtypes, tuple(DTYPES)),
        ("--archs", options.archs, archs),
        ("--count", options.count, ("none", *DTYPES)),
        ("--shapes", options.shapes, sizes.SETS),
    ):
        cases.check_known(name, given, allowed)
    workers = len(os.sched_getaffinity(0))
    own = _csrc([int(arch) for arch in options.archs]) if "spectrum" in options.ops else []
    asked_ops = [op for op in options.ops if op != "spectrum"]
    asked = [
        question
        for name in options.shapes
        for question in report.questions(asked_ops, name, options.dtypes)
    ]
    compiled = list(report.compile_all(asked, [int(arch) for arch in options.archs], workers))
    print(report.compiled_table(compiled))
    counted = report.counted(asked_ops, [name for name in options.count if name != "none"])
    moved = list(report.count_all(counted, workers))
    if moved:
        print(f"\n{report.moved_table(moved)}\n\n{report.modelled_table(moved)}")
    device, name, timed = "cpu", "", list[measured.Timed]()
    if torch.cuda.is_available():
        device = "cuda"
        name, timed = measured.measure([question.case for question in asked])
        print(f"\n{report.measured_table(name, timed)}")
    solves = list[csrc_counts.Counted]()
    if own:
        print(f"\n{table.aligned(csrc_kernels.HEADER, csrc_kernels.rows(own))}")
        if options.count != ["none"]:
            solves = [csrc_counts.count(*shape) for shape in csrc_counts.SHAPES]
            print(f"\n{csrc_counts.tables(solves, own)}")
    figures = [
        *report.figures(compiled, moved, name, timed),
        *csrc_kernels.figures(own),
        *csrc_counts.figures(solves, own),
    ]
    if options.json is not None:
        meta = results.meta_of(results.describe_run(device))
        sources = {chip.name: chip.source for chip in chips.CHIPS}
        results.write_json(Path(options.json), {**meta, "chips": sources}, figures)
    if options.csv is not None:
        columns = ("name", "variant", "metric", "unit", "value")
        write_csv(Path(options.csv), columns, figures)
    broken = [row for row in compiled if row.broken], [row for row in moved if row.broken]
    total = len(broken[0]) + len(broken[1]) + sum(1 for kernel in own if kernel.broken)
    print(f"\n{len(compiled) + len(own)} kernels compiled, {total} broken rules")
    return 1 if total else 0


def _csrc(archs: Sequence[int]) -> list[csrc_kernels.Kernel]:
    """csrc's kernels; where nvcc is missing a line says so."""
    from . import csrc_kernels

    try:
        return [kernel for arch in archs for kernel in csrc_kernels.compile_for(arch)]
    except RuntimeError as error:
        print(error)
        return []
