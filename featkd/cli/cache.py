"""`featkd cache`: store a teacher's outputs, or verify a stored cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featkd.cache import CacheConfig
from featkd.cli.arguments import Parser, UsageError, add_quiet, from_options
from featkd.cli.output import results_unless, warn
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
    config, out = from_options(CacheConfig, options), Path(recipe.out)
    with (
        distributed.joined(recipe.device) as context,
        distributed.explain_lost_processes(f"the same command continues {out}"),
    ):
        built = build_cache(
            recipe, config, context, out, quiet=options.quiet, dry_run=options.dry_run
        )
    code = 0 if built.interrupted_by is None else 128 + built.interrupted_by
    if not context.is_main:
        return code
    if options.dry_run:
        print(f"{_described(built.manifest)}: {built.size.describe(out)}")
    elif code:
        warn(f"stopped by signal {built.interrupted_by}; the same command continues from here")
    else:
        if built.bad_files:
            warn(
                f"unreadable images: {len(built.bad_files)}; each of their rows holds the outputs "
                "of the next readable image, and a run that can read one of them refuses its row"
            )
        repaired = f", {built.damaged} of them to replace damaged ones" if built.damaged else ""
        print(f"{out}: {_described(built.manifest)}, {built.written} written{repaired}")
    return code


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
            warn(damage)
    if damaged:
        warn(f"{folder}: {damaged} of {shards} shards are damaged or missing")
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
        usage="featkd cache --verify DIR",
        out=("CACHE", "folder of the cache on this machine (default: none)"),
    )
    text = "check every byte of the cache in DIR instead; takes no other argument"
    parser.add_argument("--verify", metavar="DIR", help=text)
    parser.add_options_of(CacheConfig)
    text = "run the teacher on one batch, report the size of the cache, and write nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    add_quiet(parser)
    return parser
