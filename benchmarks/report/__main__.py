"""The command: compiles, counts, checks the rules, and prints or writes the figures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import cases, results, table
from ..problem import DTYPES
from ..results import Measured

try:
    from . import aot, chips, compiled, csrc_kernels, host, modelled, traffic
except ModuleNotFoundError as error:
    if error.name != "ptx_emulator":
        raise
    sys.exit("benchmarks.report needs ptx_emulator: run pip install --editable tools/ptx_emulator")

OPS = (*cases.ROW_OPS, "spectrum")
PARTS = ("compiled", "traffic", "host", "modelled", "measured")


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts; returns 1 if a rule is broken, otherwise 0."""
    parser = _parser()
    options = parser.parse_args(words)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: no folder {options.json.parent} to write {options.json} in")
    parts, row_ops = options.parts, [op for op in options.ops if op != "spectrum"]
    figures: list[Measured] = []
    broken: list[str] = []

    def show(title: str, found: Sequence[Measured]) -> None:
        figures.extend(found)
        if found:
            print(f"{table.pivot(title, found)}\n", flush=True)

    def check(rows: Sequence[Any]) -> None:
        broken.extend(f"{row.name}: {text}" for row in rows for text in row.broken)

    if "compiled" in parts:
        jobs = compiled.default_jobs(row_ops, options.dtypes, options.archs)
        kernels = list(compiled.compile_all(jobs, len(os.sched_getaffinity(0))))
        show("kernel", [x for kernel in kernels for x in kernel.figures()])
        if kernels:
            print(f"{compiled.summary(kernels)}\n")
        own = _csrc(options.archs) if "spectrum" in options.ops else []
        show("kernel", [x for kernel in own for x in kernel.figures()])
        check([*kernels, *own])
        print(f"{len(kernels) + len(own)} kernels compiled\n")
    if "traffic" in parts:
        moved = traffic.moved(row_ops)
        show("bytes over the floor", [x for row in moved for x in row.figures()])
        check(moved)
    if "host" in parts and row_ops:
        asked = compiled.questions(row_ops, "small", ("bf16", compiled.ONE_DTYPE))
        forms = (*compiled.FORMS, "mse")
        launches = [x for q in asked if q.case.problem.form in forms for x in host.count(q.case)]
        show("launches", [x for row in launches for x in row.figures()])
        times = host.measure()
        show("host time", [x for row in times for x in row.figures()])
        for row in times:  # no broken rule: a busy machine can cause it
            print("".join(f"{row.name}: {text}\n" for text in row.broken), end="")
    if "modelled" in parts and row_ops:
        show("whole ops", modelled.model())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "measured" in parts and device == "cuda":
        published = compiled.questions(row_ops, "published", options.dtypes)
        variant = f"{torch.cuda.get_device_name()} measured"
        timed = aot.measure([q.case for q in published])
        show("launch", [(launch, variant, "time", "us", us) for launch, us in timed])
    if options.json is not None:
        meta = results.meta_of(results.describe_run(device))
        results.write_json(options.json, meta, figures)
    print("\n".join([*broken, f"{len(broken)} broken rules"]))
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Compiles every kernel for sm_80, sm_90 and sm_100, counts its traffic and "
        "launches, checks the rules, models whole ops, and times each launch if there is a GPU.",
    )
    known: dict[str, Sequence[Any]] = {
        "ops": OPS, "dtypes": tuple(DTYPES), "archs": tuple(chips.CHIPS), "parts": PARTS
    }  # fmt: skip
    for name, choices in known.items():
        kind = type(choices[0])
        parser.add_argument(
            f"--{name}", nargs="+", type=kind, choices=choices, default=choices, help="default: all"
        )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="figures as JSON")
    return parser


def _csrc(archs: Sequence[int]) -> list[csrc_kernels.Kernel]:
    """Compiles csrc's kernels; prints why if that is not possible."""
    try:
        return [kernel for arch in archs for kernel in csrc_kernels.compile_for(arch)]
    except RuntimeError as error:
        print(error)
        return []


if __name__ == "__main__":
    sys.exit(main())
