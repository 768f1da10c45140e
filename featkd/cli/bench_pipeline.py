"""`featkd bench loader`, `step` and `train`: arguments, printed tables, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from featkd.runtime.names import aligned
from featkd.runtime.suggest import suggestion

if TYPE_CHECKING:
    from featkd.benchmarks.throughput import Rate
    from featkd.runtime.distributed import ProcessContext

IMAGES = 1024
"""Images per epoch of the loaders."""


def add_loader(parser: ArgumentParser) -> None:
    """Add the arguments of `featkd bench loader`."""
    _add_timing(parser, 64, "time only these, for example dali/plain")
    _add_loading(parser)


def _add_timing(parser: ArgumentParser, batch_size: int, variants: str) -> None:
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images per batch")
    parser.add_argument("--variants", nargs="+", type=str, default=[], help=variants)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after a warm-up round")


def _add_loading(parser: ArgumentParser) -> None:
    _add_data(parser, "generated images")
    parser.add_argument("--images", type=int, default=IMAGES, help="images per epoch, at least")
    text = "worker processes (0: none), or threads of DALI"
    parser.add_argument("--workers", type=int, default=2, help=text)


def _add_data(parser: ArgumentParser, otherwise: str) -> None:
    text = "folder with class folders of photographs, or with such a folder 'train'"
    parser.add_argument("--data", metavar="DIR", help=f"{text} (default: {otherwise})")


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
        batch_size, rounds, about = options.batch_size, options.rounds, photos.about
        rates, refused = loader.measure(photos, variants, batch_size=batch_size, rounds=rounds)
        stages = loader.measure_stages(photos, images=min(options.images, 128), rounds=rounds)
        stages += loader.measure_overhead(photos, batch_size=batch_size, rounds=rounds)
    for variant, why in refused.items():
        print(f"{variant} is left out: {why}")
    known, everything = {rate.variant: rate for rate in rates}, [*rates, *stages]
    lines = []
    for rate in everything:
        beside = known.get(f"timm/{rate.variant.split('/')[-1]}") if rate in rates else None
        ratio = "" if beside is None else f"{_ratio(beside, rate):.2f}"
        lines.append((f"{rate.name} {rate.variant}", f"{rate.images_per_s:.1f}", ratio))
    print(aligned(("", "images/s", "speedup over timm"), lines, numbers=True))
    bottlenecks = {}
    for form in loader.FORMS:
        if f"timm/{form}" in known:
            name, shares = loader.busiest(everything, form, options.workers)
            bottlenecks[f"timm/{form}"] = name
            listed = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
            print(f"timm/{form}: a worker spends {listed}; the bottleneck is {name}")
    meta = {"images": about, "refused": refused, "bottleneck": bottlenecks}
    _write_json(options, "cpu", meta, throughput.figures(everything))
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
    _add_updates(parser)
    _add_data(parser, "normal noise")


def _add_updates(parser: ArgumentParser) -> None:
    text = "recipe file or name; its teacher gets random weights"
    default = "widelast_imagenet_softkd_mse"
    parser.add_argument("recipe", nargs="?", default=default, metavar="RECIPE", help=text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    _add_timing(
        parser,
        8,
        "time only these, for example eager_fp32 featkd cached; docs/benchmarks.md lists them "
        "(default: all except featkd_bf16; train also leaves out cached)",
    )


def add_train(parser: ArgumentParser) -> None:
    """Add the arguments of `featkd bench train`."""
    _add_updates(parser)
    _add_loading(parser)
    parser.add_argument("--loader", default="timm", help="loader: timm, dali or auto")
    parser.add_argument("--updates", type=int, default=4, help="updates per round")


def step(options: Namespace) -> int:
    """Run `featkd bench step` and return the exit code."""
    from featkd.runtime import distributed

    _check_counts(options, "batch_size", "rounds")
    with distributed.joined(options.device) as context:
        return _updates(context, options, None)


def train(options: Namespace) -> int:
    """Run `featkd bench train` and return the exit code."""
    from featkd.runtime import distributed

    _check_counts(options, "batch_size", "rounds", "images", "updates")
    with distributed.joined(options.device) as context:
        return _updates(context, options, options.loader)


def _updates(context: ProcessContext, options: Namespace, backend: Any) -> int:
    """Time the update and its parts; with a loader's name, also loading and both together."""
    from featkd.benchmarks import step, throughput, train_step
    from featkd.benchmarks.photographs import photographs
    from featkd.train.recipe_file import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(options.recipe))
    known = step.ways(context.device)
    names = options.variants and _chosen("variants", options.variants, tuple(known))
    if not names:  # slow bf16 and filling a cache take many minutes
        optional = {"featkd_bf16"}
        if backend is not None or recipe.teacher is None:
            optional.add(step.CACHED)
        names = [name for name in known if name not in optional]
    variants = {name: known[name] for name in names}
    together = None
    count = options.batch_size if backend is None else max(options.images, options.batch_size)
    with photographs(options.data, recipe.data, count) as photos:
        data = replace(photos.data, workers=0)
        if backend is not None:
            data = replace(data, workers=options.workers, backend=backend)
        recipe = replace(recipe, data=data, batch_size=options.batch_size)
        noise = options.data is None
        images = "normal noise" if noise and backend is None else photos.about
        print(f"{options.recipe}, batch {options.batch_size} on {context.device}, images: {images}")
        print("\n".join(f"  {name}: {way.about}" for name, way in variants.items()), flush=True)
        batch_of = step.random_batch if noise else step.first_batch
        rates = step.measure(recipe, context, variants, options.rounds, batch_of)
        if backend is not None:
            together = train_step.measure(
                recipe, context, variants, updates=options.updates, rounds=options.rounds
            )
    found, waiting = list(rates), dict.fromkeys(names, 0.0)
    shares = {name: step.shares(rates, name) for name in names}
    if together is not None:
        found += [together.loader, *together.train.values()]
        waiting = together.waiting
    print(aligned(*_beside(found, shares), numbers=True))
    bottlenecks = {name: train_step.bottleneck(waiting[name], shares[name]) for name in names}
    for name in names:
        waits = f" (waiting for the loader: {waiting[name]:.1%})" if together else ""
        print(f"{name}: the bottleneck is the {bottlenecks[name]}{waits}")
    figures = throughput.figures(found)
    figures += [
        (part, name, "share_of_step", "ratio", share)
        for name, parts in shares.items()
        for part, share in parts.items()
    ]
    figures += [
        (rate.name, rate.variant, "speedup", "ratio", ratio)
        for rate in found
        if (ratio := _speedup(rate, found)) is not None
    ]
    if together is not None:
        figures += [("train", n, "waiting_share", "ratio", x) for n, x in waiting.items()]
    ways = {name: way.about for name, way in variants.items()}
    meta = {"images": images, "ways": ways, "bottleneck": bottlenecks}
    _write_json(options, context.device.type, meta, figures)
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
