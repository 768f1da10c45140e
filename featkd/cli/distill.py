"""`featkd distill`: train a student as a recipe describes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featkd.cli.arguments import Parser, UsageError, add_quiet
from featkd.cli.output import results_unless, warn
from featkd.cli.recipe_arguments import parse_recipe, recipe_parser
from featkd.runtime.names import plural
from featkd.runtime.scores import describe

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from featkd.train.recipe import Recipe
    from featkd.train.trainer import Outcome


def distill(words: Sequence[str]) -> int:
    """Run `featkd distill` and return the exit code."""
    recipe, options = parse_recipe(parser(), words)
    if options.print_config:
        from featkd.train.recipe import to_yaml

        print(to_yaml(recipe), end="")
        return 0
    with results_unless(options.quiet and not options.dry_run):
        return _train(recipe, options)


def _train(recipe: Recipe, options: Namespace) -> int:
    from featkd.runtime import distributed, interrupt
    from featkd.train.dryrun import dry_run
    from featkd.train.trainer import Trainer

    interrupt.loading_done()
    resumes = options.resume not in ("auto", "force", "never")
    if resumes and "://" not in options.resume and not Path(options.resume).is_file():
        raise UsageError(
            f"--resume: expected auto, force, never or a checkpoint file; got {options.resume!r}, "
            "and there is no such file"
        )
    hint = f"--resume auto continues from the last checkpoint in {recipe.out}"
    remedy = f"{hint}, if one was saved; torchrun --max-restarts does so by itself"
    with (
        distributed.joined(recipe.device) as context,
        distributed.explain_lost_processes(remedy),
    ):
        if options.dry_run:
            report = dry_run(recipe, context)
            if context.is_main:
                print(report)
            return 0
        trainer = Trainer(recipe, context, resumes=resumes)
        outcome = trainer.run(options.resume, quiet=options.quiet)
    if outcome.interrupted_by is not None:
        if options.quiet and context.is_main:
            warn(f"stopped by signal {outcome.interrupted_by}; {hint}")
        return 128 + outcome.interrupted_by
    if context.is_main:
        print(f"{recipe.out}: {_summary(outcome)}")
    return 0


def _summary(outcome: Outcome) -> str:
    """Return the last line of a run: updates, best accuracy, speed, unreadable images."""
    best = outcome.best
    facts = [plural(outcome.updates, "update")]
    if best:  # empty if the run was never evaluated
        facts.append(
            f"best {describe(best)} (best.pt: {best['weights']} weights, epoch {best['epoch']})"
        )
    speed = outcome.images_per_s
    facts.append("nothing was left to train" if math.isnan(speed) else f"{speed:.1f} images/s")
    if outcome.bad_files:
        facts.append(f"{plural(len(outcome.bad_files), 'unreadable image')} left out")
    return ", ".join(facts)


def parser() -> Parser:
    """Return the parser of `featkd distill`."""
    parser = recipe_parser(
        "distill",
        "Train a student, with or without a teacher.",
        (
            "featkd distill cifar10_teacher --data CIFAR --out runs/teacher",
            "featkd distill widelast_imagenet_softkd_mse --data /data/imagenet --dry-run",
        ),
    )
    parser.add_argument(
        "--resume",
        type=str,
        default="auto",
        metavar="auto|force|never|FILE",
        help="continue from the last checkpoint in --out if there is one, unless the recipe is of "
        "another experiment (auto) or in any case (force); start a new run, in an --out without "
        "checkpoints (never); or continue from a checkpoint file",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take a few updates, report model sizes, schedule, memory and speed",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole recipe as YAML and stop"
    )
    add_quiet(parser)
    return parser
