"""`featkd predict`: classes, probabilities and features of a folder of images."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featkd.cli.arguments import Parser, UsageError, add_quiet, check_folders
from featkd.cli.model_arguments import add_models, check_count, check_models, load_model
from featkd.cli.output import results_unless
from featkd.runtime.names import listed, plural

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from featkd.data import Loader
    from featkd.evaluation import ImageOutputs
    from featkd.models import FeatureModel

_DESCRIPTION = """\
Write the most probable classes of each image below a folder, and by choice its pooled feature.
Under torchrun the processes share the images."""
_SUFFIXES = (".npy", ".safetensors")


def predict(words: Sequence[str]) -> int:
    """Run `featkd predict` with the arguments of a command line; return the exit code."""
    args = parser().parse_args(words)
    _check(args)
    from featkd.data.factory import build_evaluation_loader
    from featkd.evaluation import extract_features
    from featkd.runtime import distributed, interrupt
    from featkd.train.precision import autocast

    interrupt.loading_done()
    name: str = next(iter((*args.checkpoints, *args.model)))
    with distributed.joined(args.device) as context:
        with distributed.explain_lost_processes("start the command again"):
            loaded = load_model(name, args, context.device.type)
            # All images below the folder, whatever the splits of a recipe.
            data = replace(
                loaded.data, labels="none", train_split=".", val_split=".", val_fraction=None
            )
            loader = build_evaluation_loader(
                data,
                split="train",
                batch_size=args.batch_size,
                rank=context.rank,
                world_size=context.world_size,
                device=context.device,
                limit=args.images,
            )
            try:
                found = extract_features(
                    loaded.model.to(context.device),
                    loader,
                    context,
                    autocast=lambda: autocast(loaded.amp, context.device),
                    top=args.top,
                )
            finally:
                loader.close()
            left_out = context.merge_dicts(loader.bad_images)
        if found is not None:  # on process 0
            _write(args, found, loader, loaded.model)
            if left_out:
                count = plural(len(left_out), "unreadable image")
                print(f"featkd: {count} left out: {listed([*left_out], 3)}", file=sys.stderr)
            with results_unless(args.quiet):
                print(f"{args.out}: {plural(len(found), 'image')}")
    return 0


def _check(args: Namespace) -> None:
    """Raise an error if an option can't be used."""
    check_models(args)
    check_count(args, "top")
    check_folders(args, ("out", "features"))
    names = (*args.checkpoints, *args.model)
    if len(names) > 1:
        raise UsageError(f"expected one model, got {listed(names)}")
    if args.features is not None and not args.features.endswith(_SUFFIXES):
        raise UsageError(
            f"--features: expected a file ending in {' or '.join(_SUFFIXES)}, got {args.features}"
        )


def _write(args: Namespace, found: ImageOutputs, loader: Loader, model: FeatureModel) -> None:
    """Write the table, and the features in its order."""
    from featkd.evaluation.classes import output_names
    from featkd.runtime.files import atomic_write

    names = output_names(model)
    ranks = range(1, found.ranking.shape[1] + 1)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["image", *(f"{what}_{i}" for i in ranks for what in ("class", "probability"))])
    folder = loader.dataset.folder
    for image, ranking, values in zip(
        found.images.tolist(), found.ranking.tolist(), found.probabilities.tolist(), strict=True
    ):
        best: list[Any] = []
        for output, value in zip(ranking, values, strict=True):
            best += [names[output], f"{value:.6g}"]
        rows.writerow([os.path.relpath(loader.dataset.name(image), folder), *best])
    with atomic_write(Path(args.out)) as file:
        file.write(os.fsencode(text.getvalue()))
    if args.features is None:
        return
    with atomic_write(Path(args.features)) as file:
        if args.features.endswith(".npy"):
            import numpy as np

            np.save(file, found.features.numpy())
        else:
            from safetensors.torch import save

            file.write(save({"features": found.features.contiguous()}))


def parser() -> Parser:
    """Return the parser of `featkd predict`."""
    parser = Parser(
        prog="featkd predict",
        description=_DESCRIPTION,
        examples=(
            "featkd predict runs/cifar/best.pt --data PHOTOS --out classes.csv",
            "featkd predict --model deit_tiny_patch16_224 --pretrained --data PHOTOS "
            "--out classes.csv --features features.safetensors",
        ),
    )
    parser.add_argument("--out", type=str, required=True, metavar="FILE.csv", help="the table")
    parser.add_argument(
        "--features",
        type=str | None,
        default=None,
        metavar="FILE",
        help="file (.npy, .safetensors) for the pooled features, in the order of the table",
    )
    parser.add_argument("--top", type=int, default=5, help="number of classes per image")
    parser.add_argument(
        "--data", type=str | None, default=None, metavar="DIR", help="folder of the images"
    )
    add_models(parser)
    add_quiet(parser)
    return parser
