"""`featkd bench loader` and `step`: arguments, printed tables, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from featkd.runtime.names import aligned
from featkd.runtime.suggest import suggestion

if TYPE_CHECKING:
    from featkd.benchmarks.throughput import Rate
    from featkd.runtime.distributed import ProcessContext


def add_loader(parser: ArgumentParser) -> None:
    """Add the arguments of `featkd bench loader`."""
    _add_timing(parser, 64, "generated images", "time only these, for example dali/plain")
    text = "worker processes (0: none), or threads of DALI"
    parser.add_argument("--workers", type=int, default=2, help=text)
    parser.add_argument("--images", type=int, default=1024, help="images per epoch, at least")


def _add_timing(parser: ArgumentParser, batch_size: int, images: str, variants: str) -> None:
    text = "folder with class folders of photographs, or with such a folder 'train'"
    parser.add_argument("--data", metavar="DIR", help=f"{text} (default: {images})")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images per batch")
    parser.add_argument("--variants", nargs="+", type=str, default=[], help=variants)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after a warm-up round")


def loader(options: Namespace) -> int:
    """Run `featkd bench loader` and return the exit code."""
    from featkd.benchmarks import loader, throughput
    from featkd.benchmarks.photographs import photographs
    from featkd.data import DataConfig

    _check_counts(options, "batch_size", "images", "rounds")
    variants = _chosen("variants", options.variants, loader.VARIANTS)
    data = DataConfig(workers=options.workers)
    with photographs(options.data, data, max(options.images, options.batch_size)) as photos:
        print(f"{photos.about}; {options.workers} workers or threads, batch {options.batch_size}")
        batch_size, rounds = options.batch_size, options.rounds
        rates, refused = loader.measure(photos, variants, batch_size=batch_size, rounds=rounds)
        stages = loader.measure_stages(photos, images=min(options.images, 128), rounds=rounds)
        stages += loader.measure_overhead(photos, batch_size=batch_size, rounds=rounds)
    for variant, why in refused.items():
        print(f"{variant} is left out: {why}")
    known = {rate.variant: rate for rate in rates}
    lines = []
    for rate in [*rates, *stages]:
        beside = known.get(f"timm/{rate.variant.split('/')[-1]}") if rate in rates else None
        ratio = "" if beside is None else f"{_ratio(beside, rate):.2f}"
        lines.append((f"{rate.name} {rate.variant}", f"{rate.images_per_s:.1f}", ratio))
    print(aligned(("", "images/s", "speedup over timm"), lines, numbers=True))
    figures = throughput.figures([*rates, *stages])
    _write_json(options, "cpu", {"images": photos.about, "refused": refused}, figures)
    return 0


def _ratio(baseline: Rate, rate: Rate) -> float:
    """Return the median over the rounds of the baseline's time per image / this rate's."""
    from featkd.benchmarks.timing import speedup

    factor = rate.images / baseline.images
    ratio: float = factor * speedup(list(baseline.seconds), list(rate.seconds))
    return ratio


def _chosen(option: str, words: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    for word in words:
        if word not in known:
            raise ValueError(
                f"--{option}: expected some of {', '.join(known)}; got {word!r}"
                f"{suggestion(word, known)}"
            )
    return words or known


def _check_counts(options: Namespace, *names: str) -> None:
    from featkd.runtime.checks import check_positive

    for name in names:
        check_positive(f"--{name.replace('_', '-')}", options[name])


def _write_json(
    options: Namespace,
    device: str,
    about: Mapping[str, object],
    figures: Iterable[tuple[str, str, str, str, float]],
) -> None:
    from featkd.benchmarks import results

    if options.json is None:
        return
    settings = {k: v for k, v in options.as_dict().items() if k not in ("json", "config", "quiet")}
    meta = {**results.meta_of(results.describe_run(device)), "options": settings, **about}
    results.write_json(Path(options.json), meta, figures)


def add_step(parser: ArgumentParser) -> None:
    """Add the arguments of `featkd bench step`."""
    text = "recipe file or name; its teacher gets random weights"
    default = "widelast_imagenet_softkd_mse"
    parser.add_argument("recipe", nargs="?", default=default, metavar="RECIPE", help=text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    text = "time only these, for example eager_fp32 featkd cached; docs/benchmarks.md lists them "
    _add_timing(parser, 8, "normal noise", f"{text}(default: all except featkd_bf16)")


def step(options: Namespace) -> int:
    """Run `featkd bench step` and return the exit code."""
    from featkd.runtime import distributed

    _check_counts(options, "batch_size", "rounds")
    with distributed.joined(options.device) as context:
        return _step_on(context, options)


def _step_on(context: ProcessContext, options: Namespace) -> int:
    """Time the update and its parts in this process of a run."""
    from featkd.benchmarks import step, throughput
    from featkd.benchmarks.photographs import photographs
    from featkd.train.recipe_file import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(options.recipe))
    known = step.ways(context.device)
    names = options.variants and _chosen("variants", options.variants, tuple(known))
    if not names:  # slow bf16 takes many minutes
        optional = {"featkd_bf16", *((step.CACHED,) if recipe.teacher is None else ())}
        names = [name for name in known if name not in optional]
    variants = {name: known[name] for name in names}
    with photographs(options.data, recipe.data, options.batch_size) as photos:
        data = replace(photos.data, workers=0)
        recipe = replace(recipe, data=data, batch_size=options.batch_size)
        images = "normal noise" if options.data is None else photos.about
        print(f"{options.recipe}, batch {options.batch_size} on {context.device}, images: {images}")
        print("\n".join(f"  {name}: {way.about}" for name, way in variants.items()), flush=True)
        batch_of = step.random_batch if options.data is None else step.first_batch
        rates = step.measure(recipe, context, variants, options.rounds, batch_of)
    shares = {name: step.shares(rates, name) for name in names}
    print(aligned(*_beside(rates, shares), numbers=True))
    bottlenecks = {name: max(parts, key=lambda part: parts[part]) for name, parts in shares.items()}
    for name, part in bottlenecks.items():
        print(f"{name}: the bottleneck is the {part}")
    figures = throughput.figures(rates)
    figures += [
        (part, name, "share_of_step", "ratio", share)
        for name, parts in shares.items()
        for part, share in parts.items()
    ]
    figures += [
        (rate.name, rate.variant, "speedup", "ratio", ratio)
        for rate in rates
        if (ratio := _speedup(rate, rates)) is not None
    ]
    meta = {"images": images, "ways": {name: way.about for name, way in variants.items()}}
    _write_json(options, context.device.type, {**meta, "bottleneck": bottlenecks}, figures)
    return 0


def _speedup(rate: Rate, rates: Sequence[Rate]) -> float | None:
    """Return the median over the rounds of eager's time for this part / this rate's time."""
    for other in rates:
        if other.name == rate.name and other.variant == "eager_fp32":
            return _ratio(other, rate)
    return None


def _beside(
    rates: Sequence[Rate], shares: Mapping[str, Mapping[str, float]]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return header and lines of the table: images/s, ms per image, share, speedup per part."""
    lines = []
    for rate in rates:
        share = shares.get(rate.variant, {}).get(rate.name)
        ratio = _speedup(rate, rates)
        speed = f"{rate.images_per_s:.2f}", f"{rate.ms_per_image:.2f}"
        beside = "" if share is None else f"{share:.1%}", "" if ratio is None else f"{ratio:.2f}"
        lines.append((f"{rate.name} {rate.variant}", *speed, *beside))
    return ("", "images/s", "ms/image", "share of the update", "speedup over eager"), lines
