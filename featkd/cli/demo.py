"""`featkd demo`: train a teacher and four students on scikit-learn's digits."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from featkd.cli.arguments import Parser, add_quiet
from featkd.cli.output import results_unless


def demo(words: Sequence[str]) -> int:
    """Run `featkd demo` and return the exit code."""
    options = parser().parse_args(words)
    from featkd.demo import run_demo
    from featkd.runtime import interrupt

    interrupt.loading_done()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
            signal.signal(number, _stop)
    with results_unless(options.quiet):
        return run_demo(
            Path(options.out), seeds=options.seeds, epochs=options.epochs, quiet=options.quiet
        )


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """Exit through an exception, so that the demo also ends its child processes.

    Another signal ends this process at once, and with it the children that it waits for.
    """
    for caught in (signal.SIGINT, signal.SIGTERM):
        signal.signal(caught, signal.SIG_DFL)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def parser() -> Parser:
    """Return the parser of `featkd demo`."""
    parser = Parser(
        prog="featkd demo",
        description="Train a teacher and plain, Lift and WideLast students on scikit-learn's "
        "digits; print a table, write report.html and diagnose the feature maps. A finished run "
        "in the folder is not repeated.",
        examples=("featkd demo", "featkd demo --out /tmp/demo --seeds 1 --epochs 2"),
    )
    parser.add_argument(
        "--out", type=str, default="demo-report", metavar="DIR", help="folder for runs and report"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds per student")
    parser.add_argument(
        "--epochs", type=int | None, default=None, help="epochs per run (default: the recipe's)"
    )
    add_quiet(parser)
    return parser
