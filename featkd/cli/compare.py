"""`featkd compare`: train students that differ in one thing, over several seeds."""

from __future__ import annotations

from collections.abc import Sequence

from featkd.cli.arguments import Parser, UsageError, add_quiet
from featkd.cli.output import results_unless
from featkd.cli.recipe_arguments import parse_recipe, recipe_parser


def compare(words: Sequence[str]) -> int:
    """Run `featkd compare` and return the exit code."""
    recipe, options = parse_recipe(parser(), words)
    if not any(word.partition("=")[0] == "--out" for word in words):
        raise UsageError("--out: expected the folder of the comparison, as in --out DIR")
    from featkd.compare import compare
    from featkd.runtime import interrupt

    interrupt.loading_done()
    interrupt.raise_on_signals()
    with results_unless(options.quiet):
        compare(recipe, options.arms, options.seeds, quiet=options.quiet)
    return 0


def parser() -> Parser:
    """Return the parser of `featkd compare`."""
    parser = recipe_parser(
        "compare",
        "Train students with and without the teacher's help on the same images, seeds and updates; "
        "write results.json and report.html with intervals. The same command continues an "
        "interrupted comparison.",
        (
            "featkd compare cifar10_widelast --data CIFAR --out runs/compare",
            "featkd compare cifar10_widelast --data CIFAR --out runs/lift --arms plain,lift "
            "--seeds 5",
        ),
        out=("DIR", "folder of the runs and the report (default: none)"),
    )
    parser.add_argument(
        "--arms",
        metavar="ARM,ARM",
        help="some of ce, soft_kd, plain, plain_projector, lift, widelast, plain_wide; plain must "
        "be among them (default: all that the recipe has terms for)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds per arm, from the recipe's seed on"
    )
    add_quiet(parser)
    return parser
