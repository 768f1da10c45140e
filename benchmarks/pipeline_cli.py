"""`featkd bench loader|step|train`: arguments, what is printed, and the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from featkd.checks import check_positive, suggestion

if TYPE_CHECKING:
    from .throughput import Rate

IMAGES = 1024
"""Of an epoch of the loaders."""


def add_loader(parser: ArgumentParser) -> None:
    """Arguments of `featkd bench loader`."""
    _add_loading(parser)
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--images", type=int, default=IMAGES, help="of an epoch, at least")
    parser.add_argument(
        "--variants", nargs="+", type=str, default=[], help="only these, such as dali/plain"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up")


def _add_loading(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=str,
        default=None,
        metavar="DIR",
        help="class folders of photographs, or a folder 'train' of them; default: made images",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, or DALI's threads")


def loader(options: Namespace) -> int:
    """Run `featkd bench loader`."""
    from featkd.data import DataConfig

    from . import loader, throughput
    from .photographs import photographs

    _check_counts(options, "batch", "images", "rounds", "workers")
    variants = _chosen("variants", options.variants, loader.VARIANTS)
    data = DataConfig(workers=options.workers)
    with photographs(options.data, data, max(options.images, options.batch)) as photos:
        print(f"{photos.about}; {options.workers} workers or threads, batch {options.batch}")
        rates, refused = loader.measure(
            photos, variants, batch_size=options.batch, rounds=options.rounds
        )
        stages = loader.measure_stages(
            photos, images=min(options.images, 128), rounds=options.rounds
        )
        about = photos.about
    for variant, why in refused.items():
        print(f"{variant} is left out: {why}")
    known = {rate.variant: rate for rate in rates}
    lines = []
    for rate in [*rates, *stages]:
        beside = known.get(f"timm/{rate.variant.split('/')[-1]}") if rate in rates else None
        ratio = "" if beside is None else f"{_ratio(beside, rate):.2f}"
        lines.append((f"{rate.name} {rate.variant}", f"{rate.images_per_s:.1f}", ratio))
    print(throughput.table(("", "images/s", "timm takes (x)"), lines))
    bottlenecks = {}
    for form in loader.FORMS:
        if f"timm/{form}" in known:
            name, shares = loader.busiest([*rates, *stages], form, options.workers)
            bottlenecks[f"timm/{form}"] = name
            listed = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
            print(f"timm/{form}: a worker's time is {listed}; the bottleneck is: {name}")
    _write_json(
        options,
        "cpu",
        {"images": about, "refused": refused, "bottleneck": bottlenecks},
        throughput.figures([*rates, *stages]),
    )
    return 0


def _ratio(baseline: Rate, rate: Rate) -> float:
    """Median over the rounds of the baseline's time an image / this one's."""
    from .timing import speedup

    factor = rate.images / baseline.images
    return factor * speedup(list(baseline.seconds), list(rate.seconds))


def _chosen(option: str, words: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    for word in words:
        if word not in known:
            raise ValueError(
                f"--{option}: expected some of {', '.join(known)}; got {word!r}"
                f"{suggestion(word, known)}"
            )
    return words or known


def _check_counts(options: Namespace, *names: str) -> None:
    for name in names:
        check_positive(f"--{name}", options[name])


def _write_json(
    options: Namespace,
    device: str,
    about: Mapping[str, object],
    figures: Iterable[tuple[str, str, str, str, float]],
) -> None:
    from . import results

    if options.json is None:
        return
    settings = {k: v for k, v in options.as_dict().items() if k not in ("json", "config")}
    meta = {**results.meta_of(results.describe_run(device)), "options": settings, **about}
    results.write_json(Path(options.json), meta, figures)
