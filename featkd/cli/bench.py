"""`featkd bench`: finds the subcommand; `run`, `plot`, `table` and `compare`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from featkd.cli import bench_pipeline
from featkd.cli.arguments import Parser, UsageError, add_json, add_quiet, add_words, check_folders
from featkd.cli.output import results_unless, warn
from featkd.runtime import interrupt
from featkd.runtime.suggest import suggestion

if TYPE_CHECKING:
    from featkd.benchmarks.results import Measured, Row

COMMANDS = {
    "run": "time featkd's ops, eager torch, torch.compile of eager and of featkd's reference",
    "plot": "draw a results file",
    "table": "print a results file as a Markdown table, or write it into a document",
    "compare": "compare two results files; fail if featkd became slower, larger, or fell back",
    "loader": "time featkd's loaders, torchvision's, and the stages of loading",
    "step": "time a training update and its parts: teacher, student, loss, optimizer",
}
_EXAMPLES = {  # arguments
    "run": (
        "--ops soft_kd --out mine.csv",
        "--shapes published --dtypes fp32 bf16 --batch-sizes 32",
    ),
    "plot": ("mine.csv --out mine.svg", "mine.csv --out mine.png --json mine.json"),
    "table": ("mine.csv", "mine.csv --out page.md"),
    "compare": ("stored.csv mine.csv", "stored.csv mine.csv --tolerance 0.1 --json changes.json"),
    "loader": ("--data PHOTOGRAPHS", "--variants timm/plain dali/plain --workers 4"),
    "step": (
        "--batch-size 8 --device cpu",
        "cifar10_widelast --variants eager_fp32 featkd --json step.json",
    ),
}


def bench(words: Sequence[str]) -> int:
    """Run `featkd bench SUBCOMMAND ...` and return the exit code.

    Raises:
        ValueError: bad arguments, or results that cannot be used as asked.
        FileNotFoundError: no such file, or no folder to write one in.
    """
    # set before torch loads: kineto's log of each recording would bury the results
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if not words or words[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0 if words else 2
    name = words[0]
    if name not in COMMANDS:
        near = suggestion(name, COMMANDS)
        raise UsageError(f"bench: expected one of {', '.join(COMMANDS)}; got {name!r}{near}")
    options = _parser_of(name).parse_args(words[1:])
    check_folders(options, "out")
    interrupt.loading_done()
    with results_unless(options.quiet):
        return _PARTS[name][1](options)


def parsers() -> dict[str, Parser]:
    """Return the parser of every subcommand."""
    return {name: _parser_of(name) for name in COMMANDS}


def _parser_of(name: str) -> Parser:
    prog, text = f"featkd bench {name}", f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."
    examples = [f"{prog} {words}" for words in _EXAMPLES[name]]
    parser = Parser(prog=prog, description=text, examples=examples)
    _PARTS[name][0](parser)
    add_json(parser)
    add_quiet(parser)
    return parser


def _help() -> str:
    commands = "".join(f"  {name:8} {text}\n" for name, text in COMMANDS.items())
    examples = "".join(f"  featkd bench {x} {_EXAMPLES[x][0]}\n" for x in ("run", "step"))
    return (
        "usage: featkd bench SUBCOMMAND [arguments]\n\n"
        f"subcommands:\n{commands}\n"
        "featkd bench SUBCOMMAND --help lists the arguments of a subcommand.\n\n"
        f"examples:\n{examples}"
    )


def _add_run(parser: ArgumentParser) -> None:
    from featkd.benchmarks import cases, sizes
    from featkd.benchmarks.problem import DIRECTIONS, DTYPES

    add_words(parser, "ops", tuple(cases.OPS), tuple(cases.OPS))
    text = f"set of shapes: {', '.join(sizes.SETS)} or all"
    parser.add_argument("--shapes", default="small", help=text)
    text = "only shapes with these batch sizes"
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[], help=text)
    add_words(parser, "dtypes", tuple(DTYPES), ("fp32",))
    add_words(parser, "directions", DIRECTIONS, ("forward", "both"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    text = "time spent on each variant of each case"
    parser.add_argument("--min-seconds", type=float, default=1.0, help=text)
    parser.add_argument("--out", metavar="FILE.csv", help="results file to append to")


def _run(options: Namespace) -> int:
    from featkd.benchmarks import cases, results, run
    from featkd.benchmarks.variants import Disagreement
    from featkd.runtime import distributed
    from featkd.runtime.checks import check_positive

    check_positive("--min-seconds", options.min_seconds)
    chosen = cases.select(
        options.ops,
        options.shapes,
        options.dtypes,
        options.directions,
        options.batch_sizes,
    )
    device = distributed.start(options.device).device
    out = None if options.out is None else Path(options.out)
    if out is not None:
        if out.suffix != ".csv":
            raise ValueError(f"--out: expected a name that ends in .csv, got {out}")
        results.check_same_machine(out, results.this_machine(device.type))
    print(f"{len(chosen)} cases: median ms (speedup over eager) extra peak MiB")
    rows: list[Row] = []
    try:
        for number, measured in enumerate(run.measure(chosen, device, options.min_seconds), 1):
            print(f"{number:3} {_summary(measured)}", flush=True)
            rows += measured
            if out is not None:  # after each case, so that an interrupted run keeps its results
                results.append(out, measured)
    except Disagreement as error:
        warn(str(error))
        return 1
    if options.json is not None:
        backends = {row.case: row.backend for row in rows if row.variant == "featkd"}
        meta = {**results.meta_of(rows[0]), "device": device.type, "backends": backends}
        results.write_json(Path(options.json), meta, results.measured(rows))
    return 0


def _summary(measured: Sequence[Row]) -> str:
    parts = [
        f"{row.variant} {row.median_ms:.3g} ({row.speedup:.2f}) {row.peak_bytes / 2**20:.1f} MiB"
        for row in measured
    ]
    return f"{measured[0].case}  {', '.join(parts)}  [{measured[-1].backend}]"


def _add_results(parser: ArgumentParser) -> None:
    parser.add_argument("csv", metavar="FILE.csv", help="results file")


def _add_plot(parser: ArgumentParser) -> None:
    _add_results(parser)
    text = "picture to write: .svg or .png"
    parser.add_argument("--out", required=True, metavar="FILE", help=text)


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
        metavar="FILE.md",
        help="document with the marks '<!-- bench NAME -->' and '<!-- end bench NAME -->' for "
        "NAME.csv (default: print the table)",
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
    parser.add_argument("old", metavar="OLD.csv", help="stored results file")
    parser.add_argument("new", metavar="NEW.csv", help="new results file of the same machine")
    parser.add_argument(
        "--tolerance", type=float, default=0.15, help="relative growth that is no failure"
    )


def _compare(options: Namespace) -> int:
    from featkd.benchmarks import results
    from featkd.benchmarks.compare import compare
    from featkd.runtime.checks import check_positive

    check_positive("--tolerance", options.tolerance)

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
}
