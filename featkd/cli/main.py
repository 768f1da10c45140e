"""The command line: `featkd distill`, `cache`, `diagnose`, `bench`, `kernels` and `demo`.

Exit codes: 0 done, 1 failed while running, 2 bad arguments or recipe, 128 + N stopped by signal N.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, NoReturn

from jsonargparse import ArgumentParser, Namespace

import featkd
from featkd.cli.arguments import Parser, check_known
from featkd.runtime import openmp

if TYPE_CHECKING:
    from featkd.train.recipe import Recipe
    from featkd.train.trainer import Outcome

_COMMANDS = ("distill", "cache", "diagnose", "bench", "kernels", "demo")
_USAGE = f"""\
featkd {featkd.__version__}: feature distillation of Vision Transformers

usage: featkd COMMAND [arguments]      featkd COMMAND --help

  distill RECIPE [--field value ...]   train a student, with or without a teacher
  cache RECIPE --out DIR --views V     write what its teacher says of V epochs, for distill --cache
  diagnose --model M --data DIR --out DIR   measure the mismatch of feature maps
  bench run|plot|table|compare         time the fused ops beside eager torch and torch.compile
  bench loader|step|train              images/s of loading and of an update, and what bounds them
  kernels report                       compile every kernel, count its traffic, check the rules
  demo [--out DIR]                     teacher and four students on scikit-learn's digits
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit code."""
    openmp.set_defaults()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(featkd.__version__)
        return 0
    command, rest = words[0], words[1:]
    if command == "distill":
        return _run(_distill, rest)
    if command == "cache":
        return _run(_cache, rest)
    if command == "diagnose":
        return _run(_diagnose, rest)
    if command == "bench":
        return _run(_bench, rest)
    if command == "kernels":
        return _run(_kernels, rest)
    if command == "demo":
        return _run(_demo, rest)
    from featkd.runtime.checks import suggestion

    return _fail(f"no command {command!r}{suggestion(command, _COMMANDS)}\n\n{_USAGE}", 2)


def _run(command: Callable[[list[str]], int], words: list[str]) -> int:
    """Run a command and turn the errors a user can mend into one clear message."""
    from featkd.cache import CacheError
    from featkd.data.imageset import DATA_ERRORS
    from featkd.data.workers import is_of_worker
    from featkd.diagnostics.source import UnreadableError
    from featkd.diagnostics.state import StateError
    from featkd.runtime.distributed import ProcessLost
    from featkd.train.checkpoint import CheckpointError
    from featkd.train.evaluate import EvaluationError
    from featkd.train.meter import TrainingDiverged

    failures = (
        *DATA_ERRORS, CacheError, CheckpointError, EvaluationError, ProcessLost, StateError,
        TrainingDiverged, UnreadableError,
    )  # fmt: skip
    try:
        return command(words)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except failures as error:  # first: some are ValueErrors
        return _fail(str(error), 1)
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError) as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(str(error), 1)
    except RuntimeError as error:
        if not is_of_worker(error):
            raise
        return _fail(f"{error} Killed from outside, or for want of memory?", 1)


def _distill(words: list[str]) -> int:
    from featkd.runtime import distributed
    from featkd.train import recipe
    from featkd.train.dryrun import dry_run
    from featkd.train.trainer import Trainer

    parser = _distill_parser()
    run, options = _parse(parser, words, ("resume", "dry-run", "print-config"))
    if options.print_config:
        print(recipe.to_yaml(run), end="")
        return 0
    try:
        context = distributed.start(run.device)
        if options.dry_run:
            report = dry_run(run, context)
            if context.is_main:
                print(report)
            return 0
        with distributed.naming_lost_processes(
            f"--resume auto goes on from the last checkpoint in {run.out}, and torchrun "
            "--max-restarts does so by itself"
        ):
            outcome = Trainer(run, context).run(options.resume)
        if outcome.interrupted_by is not None:
            return 128 + outcome.interrupted_by
        if context.is_main:
            print(f"{run.out}: {_summary(outcome)}")
        return 0
    finally:
        distributed.stop()


def _summary(outcome: Outcome) -> str:
    best = outcome.best
    facts = [f"{outcome.updates} updates"]
    if best:  # not where a run ended without ever being evaluated
        facts.append(
            f"best top-1 {best['top1']:.2f} % ({best['weights']} weights, epoch {best['epoch']})"
        )
    if math.isnan(outcome.images_per_s):
        facts.append("nothing was left to train")
    else:
        facts.append(f"{outcome.images_per_s:.1f} images/s")
    if outcome.bad_files:
        facts.append(f"{len(outcome.bad_files)} unreadable images left out")
    return ", ".join(facts)


def _diagnose(words: list[str]) -> int:
    from featkd.cli.diagnose import diagnose

    return diagnose(words)


def _bench(words: list[str]) -> int:
    from featkd.cli.bench import bench

    code: int = bench(words)
    return code


def _kernels(words: list[str]) -> int:
    from featkd.cli.kernels import kernels

    code: int = kernels(words)
    return code


def _demo(words: list[str]) -> int:
    from featkd.demo import run_demo

    parser = ArgumentParser(prog="featkd demo", description=run_demo.__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write to")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a student")
    parser.add_argument("--epochs", type=int, default=None, help="epochs a run (default: recipe's)")
    args = parser.parse_args(words)
    signal.signal(signal.SIGTERM, _stop)
    return run_demo(args.out, seeds=args.seeds, epochs=args.epochs)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """End as after an exception, so that the demo's running children are ended as well."""
    raise SystemExit(128 + number)


def _recipe_parser(prog: str, purpose: str) -> ArgumentParser:
    from featkd.train.recipe import Recipe, shipped_recipes

    parser = Parser(
        prog=prog,
        print_config=None,
        description=(
            f"{purpose} The first argument is a recipe file or the name of one that ships with "
            f"featkd: {', '.join(shipped_recipes())}."
        ),
    )
    parser.add_argument("--config", action="config", help="the same as the first argument")
    parser.add_class_arguments(Recipe)
    return parser


def _distill_parser() -> ArgumentParser:
    parser = _recipe_parser("featkd distill", "Train a student as a recipe says.")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: go on from the last checkpoint in out, if any; never; or a checkpoint file",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take two updates, and say what the run would do",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole recipe as YAML and stop"
    )
    return parser


def _cache_parser() -> ArgumentParser:
    from featkd.cache.config import ENERGY, TOP, CacheConfig, Features, Store

    parser = _recipe_parser(
        "featkd cache", "Write what a recipe's teacher says of its training images."
    )
    parser.add_argument("--views", type=int, default=1, help="epochs whose samples are kept")
    parser.add_argument(
        "--logits-top",
        type=int | Literal["all"] | None,
        default=None,
        help="classes whose log-probabilities are kept, the largest ones, in fp16; all: the logits "
        f"as they are (default: all beside maps, else {TOP}, or all where there are no more)",
    )
    parser.add_argument(
        "--features",
        type=Features | None,
        default=None,
        help="maps of the teacher's layers in loss.pairs: whole, or each image's leading singular "
        "directions (default: full where the loss compares maps, else none)",
    )
    parser.add_argument(
        "--energy",
        type=float | None,
        default=None,
        help=f"lowrank: the share of each map's energy that is kept (default: {ENERGY})",
    )
    parser.add_argument(
        "--rank", type=int | None, default=None, help="lowrank: directions, in place of an energy"
    )
    parser.add_argument(
        "--store",
        type=Store | None,
        default=None,
        help="fp16 or int8, with scales; full: also fp32 and bf16 (default: int8)",
    )
    parser.add_argument(
        "--shard-rows",
        type=int,
        default=CacheConfig.shard_rows,
        help="rows of a file, rounded up to whole batches",
    )
    return parser


_VERIFY = "--verify"


def _cache(words: list[str]) -> int:
    """`featkd cache RECIPE --out DIR ...`, or `featkd cache --verify DIR`."""
    from featkd.cache import CacheConfig
    from featkd.runtime import distributed
    from featkd.train.build_cache import fill
    from featkd.train.recipe import check_local

    if words[:1] == [_VERIFY]:
        if len(words) != 2:
            raise ValueError(f"{_VERIFY}: expected one folder, got {words[1:]}")
        check_local(_VERIFY, words[1])
        return _verify(Path(words[1]))
    names = [field.name.replace("_", "-") for field in fields(CacheConfig)]
    run, options = _parse(_cache_parser(), words, names)
    if not any(word.partition("=")[0] == "--out" for word in words):
        raise ValueError("--out: expected the folder of the cache, got nothing")
    check_local("out", run.out)
    check_local("data.path", run.data.path)
    config = CacheConfig(**{field.name: options[field.name] for field in fields(CacheConfig)})
    try:
        context = distributed.start(run.device)
        with distributed.naming_lost_processes(f"the same command goes on with {run.out}"):
            found = fill(run, config, context, Path(run.out))
        if found.interrupted_by is not None:
            if context.is_main:
                said = f"stopped by signal {found.interrupted_by}"
                print(f"featkd: {said}; the same command goes on from here", file=sys.stderr)
            return 128 + found.interrupted_by
        if context.is_main:
            if found.bad_files:
                print(
                    f"featkd: rows of {len(found.bad_files)} unreadable images are of the images "
                    "after them; a run that can read one of them refuses its rows",
                    file=sys.stderr,
                )
            manifest = found.manifest
            mended = f", {found.damaged} of them damaged before" if found.damaged else ""
            print(
                f"{run.out}: {manifest.views} views of {manifest.rows} rows in "
                f"{manifest.views * manifest.shards} shards, {found.written} now written{mended}"
            )
        return 0
    finally:
        distributed.stop()


def _verify(folder: Path) -> int:
    """Check every byte of a cache, and name what is damaged or missing."""
    from featkd.cache import damages
    from featkd.cache.manifest import read_manifest

    manifest = read_manifest(folder)
    shards, damaged = 0, 0
    for damage in damages(folder):
        shards += 1
        if damage is not None:
            damaged += 1
            print(f"featkd: {damage}", file=sys.stderr)
    if damaged:
        return _fail(f"{folder}: {damaged} of {shards} shards are damaged or missing", 1)
    print(f"{folder}: {manifest.views} views of {manifest.rows} rows in {shards} shards, all whole")
    return 0


def _parse(
    parser: ArgumentParser, words: list[str], others: Sequence[str]
) -> tuple[Recipe, Namespace]:
    """The recipe of a command line, and its other options."""
    from featkd.train.recipe import Recipe, check_fields, field_names, find_recipe

    if words and not words[0].startswith("-"):
        path = find_recipe(words[0])
        check_fields(path)
        words = ["--config", str(path), *words[1:]]
    known = [*field_names(), "config", "help", *others]
    check_known(words, known, ("student.options.", "teacher.options."))
    parsed = parser.parse_args(words)
    built = parser.instantiate(parsed)
    return Recipe(**{entry.name: built[entry.name] for entry in fields(Recipe)}), parsed


def _fail(message: str, code: int) -> int:
    print(f"featkd: {message}", file=sys.stderr)
    return code
