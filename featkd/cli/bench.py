"""`featkd bench`: run, plot, table, compare; bench_pipeline.py has loader, step, train."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from featkd.cli import bench_pipeline
from featkd.cli.arguments import Parser, add_json, check_folders, several
from featkd.runtime.checks import check_positive, suggestion

if TYPE_CHECKING:
    import torch

    from featkd.benchmarks.results import Measured, Row

_COMMANDS = {
    "run": "time featkd beside eager torch, torch.compile of that and of featkd's reference",
    "plot": "draw a results file",
    "table": "print a results file as a Markdown table, or put it into a document",
    "compare": "fail where featkd became slower, larger, or fell back to the reference",
    "loader": "images/s of the loaders beside torchvision's, and of their stages",
    "step": "images/s of an update and its parts: teacher, student, loss, optimizer",
    "train": "the same with a loader beside it: what bounds a run",
}


def bench(words: Sequence[str]) -> int:
    """Run `featkd bench ...` and return the exit code.

    Raises:
        ValueError: bad arguments, or results that cannot be used as asked.
        FileNotFoundError: a file that isn't there.
    """
    # kineto's log of each recording would drown ours; read as torch loads
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    command, rest = (words[0], list(words[1:])) if words else ("--help", [])
    if command in ("-h", "--help"):
        print("usage: featkd bench COMMAND [arguments]      featkd bench COMMAND --help\n")
        print("\n".join(f"  {name:8} {text}" for name, text in _COMMANDS.items()))
        return 0 if words else 2
    if command not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        near = suggestion(command, _COMMANDS)
        raise ValueError(f"bench: expected one of {known}; got {command!r}{near}")
    parser = Parser(prog=f"featkd bench {command}", description=_COMMANDS[command])
    add, work = _PARTS[command]
    add(parser)
    add_json(parser)
    options = parser.parse_args(rest)
    check_folders(options, ("json", "out"))
    return work(options)


def _add_run(parser: ArgumentParser) -> None:
    from featkd.benchmarks import cases, sizes
    from featkd.benchmarks.problem import DIRECTIONS, DTYPES

    several(parser, "ops", tuple(cases.OPS), tuple(cases.OPS))
    parser.add_argument(
        "--shapes", type=str, default="small", help=f"{', '.join(sizes.SETS)} or all"
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[], help="only shapes of so many images"
    )
    several(parser, "dtypes", tuple(DTYPES), ("fp32",))
    several(parser, "directions", DIRECTIONS, ("forward", "both"))
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--min-seconds", type=float, default=1.0, help="to spend on each variant of each case"
    )
    parser.add_argument(
        "--out", type=str, default=None, metavar="FILE.csv", help="results file to add rows to"
    )


def _run(options: Namespace) -> int:
    check_positive("--min-seconds", options.min_seconds)
    from featkd.benchmarks import cases, results, run
    from featkd.benchmarks.variants import Disagreement

    chosen = cases.select(
        *(options.ops, options.shapes, options.dtypes, options.directions, options.batches)
    )
    device = _device(options.device)
    out = None if options.out is None else Path(options.out)
    if out is not None:
        if out.suffix != ".csv":
            raise ValueError(f"--out: expected a name that ends in .csv, got {out}")
        results.check_same_machine(out, results.this_machine(device.type))
    print(f"{len(chosen)} cases; medians in ms, in brackets eager's time / it; extra peak in MiB")
    rows: list[Row] = []
    try:
        for number, measured in enumerate(run.measure(chosen, device, options.min_seconds), 1):
            print(f"{number:3} {_summary(measured)}", flush=True)
            rows += measured
            if out is not None:  # after every case: an interrupted run keeps what it has
                results.append(out, measured)
    except Disagreement as error:
        print(f"featkd: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        backends = {row.case: row.backend for row in rows if row.variant == "featkd"}
        meta = {**results.meta_of(rows[0]), "device": str(device), "backends": backends}
        results.write_json(Path(options.json), meta, results.measured(rows))
    return 0


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda asked for, but torch sees no CUDA device here")
    return torch.device(name)


def _summary(measured: Sequence[Row]) -> str:
    parts = [
        f"{row.variant} {row.median_ms:.3g} ({row.speedup:.2f}) {row.peak_bytes / 2**20:.1f} MiB"
        for row in measured
    ]
    return f"{measured[0].case}  {', '.join(parts)}  [{measured[-1].backend}]"


def _add_results(parser: ArgumentParser) -> None:
    parser.add_argument("csv", type=str, metavar="FILE.csv", help="results file")


def _add_plot(parser: ArgumentParser) -> None:
    _add_results(parser)
    parser.add_argument("--out", type=str, required=True, help="picture to write: .svg or .png")


def _plot(options: Namespace) -> int:
    from featkd.benchmarks import plot, results

    rows = results.read(Path(options.csv))
    drawn = plot.draw(rows, Path(options.out))
    _write_json(options, rows, drawn)
    print(f"wrote {options.out}")
    return 0


def _add_table(parser: ArgumentParser) -> None:
    _add_results(parser)
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        metavar="FILE.md",
        help="document with the marks '<!-- bench NAME -->' and '<!-- end bench NAME -->', NAME "
        "as in NAME.csv; default: print it",
    )


def _table(options: Namespace) -> int:
    from featkd.benchmarks import results, table

    source = Path(options.csv)
    rows = results.read(source)
    text = table.markdown(rows)
    if options.out is None:
        print(text, end="")
    else:
        table.write_into(Path(options.out), source.stem, text)
    _write_json(options, rows, results.measured(results.newest(rows).values()))
    return 0


def _add_compare(parser: ArgumentParser) -> None:
    parser.add_argument("old", type=str, metavar="OLD.csv", help="stored results")
    parser.add_argument("new", type=str, metavar="NEW.csv", help="new results, same machine")
    parser.add_argument(
        "--tolerance", type=float, default=0.15, help="growth that passes, as a fraction"
    )


def _compare(options: Namespace) -> int:
    check_positive("--tolerance", options.tolerance)
    from featkd.benchmarks import results
    from featkd.benchmarks.compare import compare

    found = compare(Path(options.old), Path(options.new), options.tolerance)
    for case in found.missing:
        print(f"not in {options.new}: {case}")
    for line in found.failures:
        print(line)
    print(f"{len(found.changes)} cases compared, {len(found.failures)} worse")
    if options.json is not None:
        old, new = (results.meta_of(r) for r in (found.changes[0].old, found.changes[0].new))
        meta = {**new, "old": old, "tolerance": options.tolerance, "missing": found.missing}
        results.write_json(Path(options.json), meta, found.measured())
    return 1 if found.failures else 0


def _write_json(options: Namespace, rows: Sequence[Row], measured: Sequence[Measured]) -> None:
    from featkd.benchmarks import results

    if options.json is not None:
        meta = {**results.meta_of(rows[-1]), "results": options.csv}
        results.write_json(Path(options.json), meta, measured)


_PARTS: dict[str, tuple[Callable[[ArgumentParser], None], Callable[[Namespace], int]]] = {
    "run": (_add_run, _run),
    "plot": (_add_plot, _plot),
    "table": (_add_table, _table),
    "compare": (_add_compare, _compare),
    "loader": (bench_pipeline.add_loader, bench_pipeline.loader),
    "step": (bench_pipeline.add_step, bench_pipeline.step),
    "train": (bench_pipeline.add_train, bench_pipeline.train),
}
