"""`featkd kernels report`: compile, count, check, and write down."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featkd.cli.arguments import Parser, add_json, check_folders, several
from featkd.runtime.checks import suggestion
from featkd.runtime.files import write_csv

if TYPE_CHECKING:
    from featkd.benchmarks import csrc_kernels

_HELP = """\
usage: featkd kernels report [arguments]      featkd kernels report --help

  report   compile every kernel for sm_80, sm_90 and sm_100, count its traffic and launches, check
           the rules, model whole ops, and measure each launch where there is a GPU
"""
_PARTS = ("compiled", "traffic", "host", "modelled")


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

    from featkd.benchmarks import (
        cases,
        chips,
        csrc_counts,
        csrc_kernels,
        host,
        measured,
        modelled,
        report,
        results,
        sizes,
        table,
    )
    from featkd.benchmarks.problem import DTYPES

    archs = [str(chip.arch) for chip in chips.CHIPS]
    ops = (*cases.ROW_OPS, "spectrum")
    description = " ".join(_HELP.split("report   ")[1].split())
    parser = Parser(prog="featkd kernels report", description=description)
    several(parser, "ops", ops, ops)
    several(parser, "dtypes", tuple(DTYPES), tuple(DTYPES))
    several(parser, "archs", archs, archs)
    several(parser, "shapes", ("default", *sizes.SETS), ("default",))
    several(parser, "parts", _PARTS, _PARTS)
    parser.add_argument("--csv", type=str, default=None, metavar="FILE", help="figures as CSV")
    add_json(parser)
    options = parser.parse_args(words)
    check_folders(options, ("csv", "json"))
    for name, given, allowed in (
        ("--ops", options.ops, ops),
        ("--dtypes", options.dtypes, tuple(DTYPES)),
        ("--archs", options.archs, archs),
        ("--shapes", options.shapes, ("default", *sizes.SETS)),
        ("--parts", options.parts, _PARTS),
    ):
        cases.check_known(name, given, allowed)
    chosen = [int(arch) for arch in options.archs]
    asked_ops = [op for op in options.ops if op != "spectrum"]
    compiled = list[report.Compiled]()
    own = list[csrc_kernels.Kernel]()
    if "compiled" in options.parts:
        jobs = report.default_jobs(asked_ops, options.dtypes, chosen)
        if options.shapes != ["default"]:
            named = [n for n in options.shapes if n != "default"]
            asked = [q for n in named for q in report.questions(asked_ops, n, options.dtypes)]
            jobs = [*(jobs if "default" in options.shapes else ()), *report.jobs(asked, chosen)]
        compiled = list(report.compile_all(jobs, chosen, len(os.sched_getaffinity(0))))
        if compiled:
            print(f"{report.compiled_table(compiled)}\n\n{report.summary(compiled)}\n")
        own = _csrc(chosen) if "spectrum" in options.ops else []
        if own:
            print(f"{table.aligned(csrc_kernels.HEADER, csrc_kernels.rows(own))}\n")
    moved = report.moved(asked_ops) if "traffic" in options.parts else []
    solves = list[csrc_counts.Counted]()
    if moved:
        print(f"{report.moved_table(moved)}\n")
    if own and "traffic" in options.parts:
        solves = [csrc_counts.count(*shape) for shape in csrc_counts.SHAPES]
        print(f"{csrc_counts.tables(solves, own)}\n")
    launched, hosts = list[host.Launches](), list[host.HostTime]()
    if "host" in options.parts and asked_ops:
        launched, hosts = report.launches(asked_ops), host.measure()
        print(f"{report.launches_table(launched)}\n\n{report.host_table(hosts)}\n")
    models = modelled.model() if "modelled" in options.parts and asked_ops else []
    if models:
        print(f"{report.modelled_table(models)}\n")
    device, name, timed = "cpu", "", list[measured.Timed]()
    if torch.cuda.is_available():
        device = "cuda"
        name, timed = measured.measure(
            [q.case for q in report.questions(asked_ops, "published", options.dtypes)]
        )
        print(f"{report.measured_table(name, timed)}\n")
    figures = [
        *report.figures(compiled, moved, launched, hosts, models, name, timed),
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
    verdicts = [row.broken for part in (compiled, moved, own) for row in part]
    total = sum(1 for broken in verdicts if broken)
    print(f"{len(compiled) + len(own)} kernels compiled, {total} broken rules")
    return 1 if total else 0


def _csrc(archs: Sequence[int]) -> list[csrc_kernels.Kernel]:
    """csrc's kernels; where nvcc is missing a line says so."""
    from featkd.benchmarks import csrc_kernels

    try:
        return [kernel for arch in archs for kernel in csrc_kernels.compile_for(arch)]
    except RuntimeError as error:
        print(error)
        return []
