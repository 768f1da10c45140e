"""`featkd cache`: store a teacher's outputs, or verify a stored cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from featkd.cache.config import DEFAULT_ENERGY, DEFAULT_TOP, CacheConfig, Features, Store
from featkd.cli.arguments import Parser, UsageError, add_quiet
from featkd.cli.output import results_unless
from featkd.cli.recipe_arguments import parse_recipe, recipe_parser
from featkd.runtime.names import plural

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from featkd.cache.manifest import Manifest
    from featkd.train.recipe import Recipe


def cache(words: Sequence[str]) -> int:
    """Run `featkd cache RECIPE --out DIR` or `featkd cache --verify DIR`; return the exit code."""
    own = parser()
    recipe, options = parse_recipe(own, words)
    from featkd.train.recipe import check_local

    options_given = {word.partition("=")[0] for word in words if word.startswith("-")}
    if options.verify is not None:
        if options_given != {"--verify"} or own.positional(words):
            raise UsageError(f"--verify: expected no other arguments, got {' '.join(words)}")
        check_local("--verify", options.verify)
        return _verify(Path(options.verify))
    if "--out" not in options_given and not options.dry_run:
        raise UsageError("--out: expected the folder of the cache, as in --out CACHE; got nothing")
    check_local("out", recipe.out)
    check_local("data.path", recipe.data.path)
    with results_unless(options.quiet and not options.dry_run):
        return _build(recipe, options)


def _build(recipe: Recipe, options: Namespace) -> int:
    from featkd.runtime import distributed, interrupt
    from featkd.train.build_cache import build_cache

    interrupt.loading_done()
    config = CacheConfig(**{field.name: options[field.name] for field in fields(CacheConfig)})
    with distributed.joined(recipe.device) as context:
        with distributed.explain_lost_processes(f"the same command continues {recipe.out}"):
            built = build_cache(
                recipe,
                config,
                context,
                Path(recipe.out),
                quiet=options.quiet,
                dry_run=options.dry_run,
            )
        if options.dry_run:
            if context.is_main:
                print(f"{_described(built.manifest)}: {built.size.describe(Path(recipe.out))}")
            return 0
        if built.interrupted_by is not None:
            if context.is_main:
                print(
                    f"featkd: stopped by signal {built.interrupted_by}; the same command "
                    "continues from here",
                    file=sys.stderr,
                )
            return 128 + built.interrupted_by
        if context.is_main:
            if built.bad_files:
                print(
                    f"featkd: unreadable images: {len(built.bad_files)}; each of their rows holds "
                    "the outputs of the next readable image, and a run that can read one of them "
                    "refuses its row",
                    file=sys.stderr,
                )
            repaired = f", {built.damaged} of them to replace damaged ones" if built.damaged else ""
            described = _described(built.manifest)
            print(f"{recipe.out}: {described}, {built.written} written{repaired}")
        return 0


def _described(manifest: Manifest) -> str:
    return (
        f"{plural(manifest.views, 'view')} of {plural(manifest.rows, 'row')} in "
        f"{plural(manifest.views * manifest.shards, 'shard')}"
    )


def _verify(folder: Path) -> int:
    """Check every byte of a cache and print each damaged or missing shard."""
    from featkd.cache import verify_cache
    from featkd.cache.manifest import read_manifest

    manifest = read_manifest(folder)
    shards, damaged = 0, 0
    for damage in verify_cache(folder):
        shards += 1
        if damage is not None:
            damaged += 1
            print(f"featkd: {damage}", file=sys.stderr)
    if damaged:
        print(
            f"featkd: {folder}: {damaged} of {shards} shards are damaged or missing",
            file=sys.stderr,
        )
        return 1
    print(f"{folder}: {_described(manifest)}, all whole")
    return 0


def parser() -> Parser:
    """Return the parser of `featkd cache`."""
    parser = recipe_parser(
        "cache",
        "Store the outputs of a recipe's teacher, for featkd distill --cache.",
        (
            "featkd cache widelast_imagenet_softkd_mse --data /data/imagenet --out CACHE --views 4",
            "featkd cache --verify CACHE",
        ),
        other_usages=("featkd cache --verify DIR",),
    )
    (out,) = (action for action in parser._actions if action.dest == "out")
    out.metavar, out.help = "CACHE", "folder of the cache on this machine (default: none)"
    parser.add_argument(
        "--verify",
        type=str,
        default=None,
        metavar="DIR",
        help="check every byte of the cache in DIR instead; takes no other argument",
    )
    parser.add_argument(
        "--views", type=int, default=CacheConfig.views, help="epochs to store the samples of"
    )
    parser.add_argument(
        "--logits-top",
        type=int | Literal["all"] | None,
        default=None,
        metavar="K|all",
        help="store the K largest log-probabilities per image, in fp16; all: the whole "
        f"logits (default: all if feature maps are stored, otherwise {DEFAULT_TOP}, or all if "
        "there are fewer classes)",
    )
    parser.add_argument(
        "--features",
        type=Features | None,
        default=None,
        metavar="|".join(get_args(Features)),
        help="feature maps of the teacher's layers in loss.pairs: full maps, the leading singular "
        "directions of each image's map (lowrank), or none (default: full if the loss compares "
        "maps, otherwise none)",
    )
    parser.add_argument(
        "--energy",
        type=float | None,
        default=None,
        help=f"lowrank: share of each map's energy to store (default: {DEFAULT_ENERGY})",
    )
    parser.add_argument(
        "--rank",
        type=int | None,
        default=None,
        help="lowrank: number of directions to store, instead of --energy",
    )
    parser.add_argument(
        "--store",
        type=Store | None,
        default=None,
        metavar="|".join(get_args(Store)),
        help="storage type of maps: fp16 or int8, both scaled; for full maps also fp32 and bf16 "
        "(default: int8)",
    )
    parser.add_argument(
        "--shard-rows",
        type=int,
        default=CacheConfig.shard_rows,
        help="rows per file, rounded up to whole batches",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run the teacher on one batch, report the size of the cache, and write nothing",
    )
    add_quiet(parser)
    return parser
