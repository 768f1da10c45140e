"""`featkd export`: write a trained student for use elsewhere."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from featkd.cli.arguments import Parser, add_json, add_quiet, check_folders
from featkd.cli.output import results_unless
from featkd.models.export import Form, Precision
from featkd.models.weights import Weights

_DESCRIPTION = """\
Write the student of a checkpoint to a folder: for timm (with a model card), as safetensors, as
ONNX, or as a program of torch.export. The written model is first compared with the checkpoint's
on images; nothing is written if they differ."""


def export(words: Sequence[str]) -> int:
    """Run `featkd export CHECKPOINT --to FORM --out DIR`; return the exit code."""
    args = parser().parse_args(words)
    check_folders(args, ("json",))
    from featkd.runtime import interrupt
    from featkd.runtime.files import atomic_write
    from featkd.train.export import export_checkpoint

    interrupt.loading_done()
    found = export_checkpoint(
        *(args.checkpoint, args.to, args.out),
        weights=args.weights,
        data=args.data,
        images=args.images,
        precision=args.precision,
        license=args.license,
    )
    for note in found.notes:
        print(f"featkd: {note}", file=sys.stderr)
    if args.json is not None:
        with atomic_write(Path(args.json)) as file:
            file.write(json.dumps(dataclasses.asdict(found), indent=2).encode() + b"\n")
    where = "random images" if found.images_from == "random" else f"images of {found.images_from}"
    with results_unless(args.quiet):
        print(
            f"{found.folder}: {found.form}, {found.precision}, weights {found.weights}; largest "
            f"difference of {found.output} {found.error:.1e} (largest {found.largest:.1e}) on "
            f"{found.images} {where if found.images != 1 else where.replace('images', 'image')}"
        )
    return 0


def parser() -> Parser:
    """Return the parser of `featkd export`."""
    parser = Parser(
        prog="featkd export",
        description=_DESCRIPTION,
        examples=(
            "featkd export runs/cifar/best.pt --to timm --license apache-2.0 --out exported",
            "featkd export runs/cifar/best.pt --to onnx --precision fp16 --data CIFAR/test "
            "--out onnx",
        ),
    )
    parser.add_argument(
        "checkpoint",
        type=str,
        metavar="CHECKPOINT",
        help="checkpoint of featkd distill, or its URL",
    )
    parser.add_argument(
        "--to",
        type=Form,
        required=True,
        metavar="|".join(get_args(Form)),
        help="a folder that timm loads, safetensors for featkd, ONNX, or torch.export's format",
    )
    parser.add_argument("--out", type=str, required=True, help="a new or an empty folder")
    parser.add_argument(
        "--weights",
        type=Weights,
        default="auto",
        metavar="|".join(get_args(Weights)),
        help="weights of the last update (model), their average (model_ema), or the ones with the "
        "better score",
    )
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        metavar="DIR",
        help="folder of images to compare on, at any depth (default: the validation images of the "
        "recipe, or random ones without them)",
    )
    parser.add_argument("--images", type=int, default=10, help="images to compare on")
    parser.add_argument(
        "--precision",
        type=Precision,
        default="fp32",
        metavar="|".join(get_args(Precision)),
        help="precision of an ONNX model; its inputs and outputs remain float32",
    )
    parser.add_argument(
        "--license",
        type=str | None,
        default=None,
        metavar="ID",
        help="license of the weights in the model card of timm, as an SPDX identifier (default: "
        "not given)",
    )
    add_json(parser)
    add_quiet(parser)
    return parser
