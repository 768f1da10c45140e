"""`featkd evaluate`: score trained students and timm models on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featkd.cli.arguments import Parser, UsageError, add_json, add_quiet, add_words, from_options
from featkd.cli.model_arguments import (
    LoadedModel,
    ModelOptions,
    add_models,
    check_count,
    load_model,
)
from featkd.cli.output import results_unless, warn, write_json
from featkd.runtime.names import aligned, listed, plural, printable

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from featkd.data import DataConfig
    from featkd.evaluation import ModelScores
    from featkd.runtime.distributed import ProcessContext

_DESCRIPTION = """\
Score models on DIR/val: top-1 and top-5 of the classifier, kNN and a linear probe of the frozen
features (from the images in DIR/train). Under torchrun the processes share the images."""
_DATA = (  # fields in the JSON file
    *("train_split", "val_split", "val_fraction", "img_size", "mean", "std", "crop_pct"),
    "interpolation",
)
_SCORES = ("head", "knn", "probe")  # of featkd.evaluation.scoring, which loads torch


def evaluate(words: Sequence[str]) -> int:
    """Run `featkd evaluate` with the arguments of a command line; return the exit code."""
    args = parser().parse_args(words)
    options = from_options(ModelOptions, args)
    check_count("k", args.k)
    if unknown := [score for score in args.scores if score not in _SCORES]:
        raise UsageError(f"--scores: expected {', '.join(_SCORES)}; got {unknown[0]}")
    if not 0 < args.temperature < float("inf"):
        raise UsageError(f"--temperature: expected a finite number > 0, got {args.temperature}")
    from featkd.runtime import distributed, environment, interrupt

    interrupt.loading_done()
    rows: list[dict[str, Any]] = []
    with (
        distributed.joined(args.device) as context,
        distributed.explain_lost_processes("start the evaluation again"),
    ):
        for name in options.names:
            loaded = load_model(name, options, context.device.type)
            found = _score(loaded, options, args, context)
            data = {key: getattr(loaded.data, key) for key in _DATA}
            about = {"name": name, "weights": loaded.weights, "amp": loaded.amp, "data": data}
            rows.append({**about, **vars(found)})
            for note in found.notes if context.is_main else ():
                warn(f"{name}: {note}")
            if found.left_out and context.is_main:
                count = plural(len(found.left_out), "unreadable image")
                warn(f"{name}: {count} left out: {listed([*found.left_out], 3)}")
    if not context.is_main:
        return 0
    images = {"data": args.data, "limit": args.images}
    content = {**images, "models": rows, "versions": environment.versions()}
    write_json(args.json, content, indent=None)
    with results_unless(args.quiet):
        print(_table(rows))
    return 0


def _score(
    loaded: LoadedModel, options: ModelOptions, args: Namespace, context: ProcessContext
) -> ModelScores:
    from featkd.evaluation import score_model
    from featkd.train.precision import autocast

    loaded.data, scores, note = _with_splits(loaded.data, args)
    found = score_model(
        loaded.model.to(context.device),
        loaded.data,
        context,
        scores=scores,
        k=args.k,
        temperature=args.temperature,
        batch_size=options.batch_size,
        limit=options.images,
        autocast=lambda: autocast(loaded.amp, context.device),
        quiet=args.quiet,
    )
    found.notes += filter(None, (note, loaded.note))
    return found


def _with_splits(data: DataConfig, args: Namespace) -> tuple[DataConfig, list[Any], str]:
    """Set the split folders; return the scores that they allow too, and a note on the others."""
    folder = Path(args.data)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data: no folder {printable(args.data)}")
    if args.train_split is not None:
        data = replace(data, train_split=args.train_split)
    if args.val_split is not None:
        data = replace(data, val_split=args.val_split, val_fraction=None)
    if data.val_split is None:
        return data, args.scores, ""
    there = listed(sorted(x.name for x in folder.iterdir() if x.is_dir()), 5) or "none"
    if not (folder / data.val_split).is_dir():
        raise FileNotFoundError(
            f"--val-split: no folder {printable(folder / data.val_split)} with validation images; "
            f"expected DIR/<split>/<class>/*.jpg; folders there: {there}"
        )
    left_out = [score for score in args.scores if score != "head"]
    if not left_out or (folder / data.train_split).is_dir():
        return data, args.scores, ""
    missing = printable(folder / data.train_split)
    note = f"no folder {missing} with training images (--train-split); folders there: {there}"
    if "head" not in args.scores:
        raise FileNotFoundError(f"--scores: {' and '.join(args.scores)}: {note}")
    return data, ["head"], f"{' and '.join(left_out)} left out: {note}"


def _table(rows: list[dict[str, Any]]) -> str:
    """Scores of the models as text, one line for each."""
    lines = []
    for row in rows:
        name = f"{row['name']} (random weights)" if row["weights"] == "random" else row["name"]
        columns = (("head", "top1"), ("head", "top5"), ("knn", "top1"), ("probe", "top1"))
        values = [row["scores"].get(score, {}).get(key) for score, key in columns]
        cells = ("-" if value is None else f"{value:.2f}" for value in values)
        lines.append((name, *cells, row["images"]))
    return aligned(("model", "top-1", "top-5", "kNN", "probe", "images"), lines, numbers=True)


def parser() -> Parser:
    """Return the parser of `featkd evaluate`."""
    parser = Parser(
        prog="featkd evaluate",
        description=_DESCRIPTION,
        examples=(
            "featkd evaluate runs/cifar/best.pt --data CIFAR --val-split test --json scores.json",
            "featkd evaluate --model deit_tiny_patch16_224 cait_s24_224 --pretrained "
            "--data IMAGENET --scores head",
        ),
    )
    add_models(parser)
    for split in ("train", "val"):
        text = f"folder below --data (default: the checkpoint's, for a timm model {split})"
        parser.add_argument(f"--{split}-split", help=text)
    add_words(parser, "scores", _SCORES, _SCORES)
    parser.add_argument("--k", type=int, default=20, help="neighbours of kNN")
    parser.add_argument("--temperature", type=float, default=0.07, help="temperature of kNN")
    add_json(parser)
    add_quiet(parser)
    return parser
