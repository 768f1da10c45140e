"""`featkd predict`: classes, probabilities and features of a folder of images."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from featkd.cli.arguments import Parser, UsageError, add_quiet, check_folders, from_options
from featkd.cli.model_arguments import ModelOptions, add_models, check_count, load_model
from featkd.cli.output import results_unless, warn
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
    options = from_options(ModelOptions, args)
    check_count("top", args.top)
    check_folders(args, "out", "features")
    if len(options.names) > 1:
        raise UsageError(f"expected one model, got {listed(options.names)}")
    if args.features is not None and not args.features.endswith(_SUFFIXES):
        raise UsageError(
            f"--features: expected a file ending in {' or '.join(_SUFFIXES)}, got {args.features}"
        )
    from featkd.data.factory import build_evaluation_loader
    from featkd.evaluation import extract_features
    from featkd.runtime import distributed, interrupt
    from featkd.train.precision import autocast

    interrupt.loading_done()
    with (
        distributed.joined(args.device) as context,
        distributed.explain_lost_processes("start the command again"),
    ):
        loaded = load_model(options.names[0], options, context.device.type)
        # All images below the folder, whatever the splits of a recipe.
        data = replace(
            loaded.data, labels="none", train_split=".", val_split=".", val_fraction=None
        )
        loader = build_evaluation_loader(
            data,
            split="train",
            batch_size=options.batch_size,
            rank=context.rank,
            world_size=context.world_size,
            device=context.device,
            limit=options.images,
        )
        with closing(loader):
            found = extract_features(
                loaded.model.to(context.device),
                loader,
                context,
                autocast=lambda: autocast(loaded.amp, context.device),
                top=args.top,
            )
        left_out = context.merge_dicts(loader.bad_images)
    if found is not None:  # on process 0
        _write(args, found, loader, loaded.model)
        if found.ranking.shape[1] == 0 and args.features is None:
            warn(
                f"{options.names[0]} has no classifier: {args.out} lists the images alone; "
                "--features FILE writes their pooled features"
            )
        if loaded.note:
            warn(loaded.note)
        if left_out:
            count = plural(len(left_out), "unreadable image")
            warn(f"{count} left out: {listed([*left_out], 3)}")
        with results_unless(args.quiet):
            print(f"{args.out}: {plural(len(found), 'image')}")
    return 0


def _write(args: Namespace, found: ImageOutputs, loader: Loader, model: FeatureModel) -> None:
    """Write the table, and the features in its order."""
    from featkd.evaluation.classes import output_names
    from featkd.runtime.files import atomic_write

    names, dataset = output_names(model), loader.dataset
    ranks = range(1, found.ranking.shape[1] + 1)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["image", *(f"{what}_{i}" for i in ranks for what in ("class", "probability"))])
    columns = (x.tolist() for x in (found.images, found.ranking, found.probabilities))
    for image, ranking, values in zip(*columns, strict=True):
        best = ((names[i], f"{value:.6g}") for i, value in zip(ranking, values, strict=True))
        path = os.path.relpath(dataset.name(image), dataset.folder)
        rows.writerow([path, *chain.from_iterable(best)])
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
    text = "file (.npy, .safetensors) for the pooled features, in the order of the table"
    parser.add_argument("--features", metavar="FILE", help=text)
    parser.add_argument("--top", type=int, default=5, help="number of classes per image")
    add_models(parser)
    add_quiet(parser)
    return parser
