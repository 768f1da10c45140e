"""`featkd evaluate`: score trained students and timm models on labelled images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featkd.cli.arguments import Parser, UsageError, add_json, add_quiet, add_words, check_folders
from featkd.cli.model_arguments import (
    LoadedModel,
    add_models,
    check_count,
    check_models,
    load_model,
)
from featkd.cli.output import results_unless
from featkd.runtime.names import listed, plural, printable

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from featkd.data import DataConfig
    from featkd.evaluation import ModelScores
    from featkd.runtime.distributed import ProcessContext

_DESCRIPTION = """\
Score models on DIR/val: top-1 and top-5 of the classifier, kNN and a linear probe of the frozen
features (from the images in DIR/train). Under torchrun the processes share the images."""
_SCORES = ("head", "knn", "probe")  # of featkd.evaluation.scoring, which loads torch


def evaluate(words: Sequence[str]) -> int:
    """Run `featkd evaluate` with the arguments of a command line; return the exit code."""
    args = parser().parse_args(words)
    check_folders(args, ("json",))
    _check(args)
    from featkd.runtime import distributed, environment, interrupt

    interrupt.loading_done()
    rows: list[dict[str, Any]] = []
    with distributed.joined(args.device) as context:
        is_main = context.is_main
        with distributed.explain_lost_processes("start the evaluation again"):
            for name in (*args.checkpoints, *args.model):
                loaded = load_model(name, args, context.device.type)
                found = _score(loaded, args, context)
                rows.append(_row(name, loaded, found))
                for note in found.notes if is_main else ():
                    print(f"featkd: {name}: {note}", file=sys.stderr)
                if found.left_out and is_main:
                    print(
                        f"featkd: {name}: {plural(len(found.left_out), 'unreadable image')} left "
                        f"out: {listed([*found.left_out], 3)}",
                        file=sys.stderr,
                    )
    if not is_main:
        return 0
    if args.json is not None:
        from featkd.runtime.files import atomic_write

        content = {
            "data": args.data,
            "limit": args.images,
            "models": rows,
            "versions": environment.versions(),
        }
        with atomic_write(Path(args.json)) as file:
            file.write(json.dumps(content).encode() + b"\n")
    with results_unless(args.quiet):
        print(_table(rows))
    return 0


def _check(args: Namespace) -> None:
    """Raise UsageError if options contradict each other."""
    check_models(args)
    check_count(args, "k")
    if unknown := [score for score in args.scores if score not in _SCORES]:
        raise UsageError(f"--scores: expected {', '.join(_SCORES)}; got {unknown[0]}")
    if not 0 < args.temperature < float("inf"):
        raise UsageError(f"--temperature: expected a finite number > 0, got {args.temperature}")


def _score(loaded: LoadedModel, args: Namespace, context: ProcessContext) -> ModelScores:
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
        batch_size=args.batch_size,
        limit=args.images,
        autocast=lambda: autocast(loaded.amp, context.device),
        quiet=args.quiet,
    )
    found.notes += [note] if note else []
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
    if (folder / data.train_split).is_dir():
        return data, args.scores, ""
    rest = [score for score in args.scores if score == "head"]
    missing = printable(folder / data.train_split)
    note = f"no folder {missing} with training images (--train-split); folders there: {there}"
    if not rest:
        raise FileNotFoundError(f"--scores: {' and '.join(args.scores)}: {note}")
    left_out = [score for score in args.scores if score != "head"]
    return data, rest, f"{' and '.join(left_out)} left out: {note}" if left_out else ""


def _row(name: str, loaded: LoadedModel, found: ModelScores) -> dict[str, Any]:
    data = loaded.data
    fields = ("train_split", "val_split", "val_fraction", "img_size", "mean", "std", "crop_pct")
    return {
        "name": name,
        "weights": loaded.weights,
        "amp": loaded.amp,
        "data": {key: getattr(data, key) for key in (*fields, "interpolation")},
        **vars(found),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """Scores of the models as text, one line for each."""
    columns = {
        "top-1": ("head", "top1"),
        "top-5": ("head", "top5"),
        "kNN": ("knn", "top1"),
        "probe": ("probe", "top1"),
    }
    width = max(5, *(len(_label(row)) for row in rows))
    lines = [f"{'model':{width}}" + "".join(f"{x:>8}" for x in (*columns, "images"))]
    for row in rows:
        cells = []
        for score, key in columns.values():
            value = row["scores"].get(score, {}).get(key)
            cells.append("-" if value is None else f"{value:.2f}")
        cells.append(str(row["images"]))
        lines.append(f"{_label(row):{width}}" + "".join(f"{x:>8}" for x in cells))
    return "\n".join(lines)


def _label(row: dict[str, Any]) -> str:
    return f"{row['name']} (random weights)" if row["weights"] == "random" else row["name"]


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
    parser.add_argument(
        "--data", type=str | None, default=None, metavar="DIR", help="folder of the split folders"
    )
    for split in ("train", "val"):
        parser.add_argument(
            f"--{split}-split",
            type=str | None,
            default=None,
            help=f"folder below DIR (default: the checkpoint's, for a timm model {split})",
        )
    add_words(parser, "scores", _SCORES, _SCORES)
    parser.add_argument("--k", type=int, default=20, help="neighbours of kNN")
    parser.add_argument("--temperature", type=float, default=0.07, help="temperature of kNN")
    add_json(parser)
    add_quiet(parser)
    return parser
