"""`featkd demo`: compare students with and without a mismatch, on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featkd.cli.arguments import Parser, add_quiet
from featkd.cli.output import results_unless


def demo(words: Sequence[str]) -> int:
    """Run `featkd demo` and return the exit code."""
    options = parser().parse_args(words)
    from featkd.demo import run_demo
    from featkd.runtime import interrupt

    interrupt.loading_done()
    interrupt.raise_on_signals()
    with results_unless(options.quiet):
        run_demo(Path(options.out), options.seeds, options.epochs, quiet=options.quiet)
    return 0


def parser() -> Parser:
    """Return the parser of `featkd demo`."""
    parser = Parser(
        prog="featkd demo",
        description="Train a teacher on scikit-learn's digits, and compare plain, Lift and "
        "WideLast students of two widths: one without and one with a mismatch. Prints what the "
        "diagnosis and the accuracies show, and writes report.html. The same command continues an "
        "interrupted demo.",
        examples=("featkd demo", "featkd demo --out /tmp/demo --seeds 1 --epochs 2"),
    )
    parser.add_argument(
        "--out", type=str, default="demo-report", metavar="DIR", help="folder for runs and report"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds per arm")
    parser.add_argument(
        "--epochs", type=int | None, default=None, help="epochs per run (default: the recipe's)"
    )
    add_quiet(parser)
    return parser
