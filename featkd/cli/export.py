"""`featkd export`: write a trained student for use elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from featkd.cli.arguments import Parser, add_json, add_quiet, from_options
from featkd.cli.output import results_unless, warn, write_json
from featkd.models.export import Form
from featkd.runtime import interrupt
from featkd.train.export import export_checkpoint

_DESCRIPTION = """\
Write the student of a checkpoint to a folder: for timm (with a model card), as safetensors, as
ONNX, or as a program of torch.export. The written model is first compared with the checkpoint's
on images; nothing is written if they differ."""


def export(words: Sequence[str]) -> int:
    """Run `featkd export CHECKPOINT --to FORM --out DIR`; return the exit code."""
    args = parser().parse_args(words)
    interrupt.loading_done()
    found = from_options(export_checkpoint, args, path=args.checkpoint, form=args.to)
    for note in found.notes:
        warn(note)
    write_json(args.json, dataclasses.asdict(found))
    where = "random images" if found.images_from == "random" else f"images of {found.images_from}"
    with results_unless(args.quiet):
        print(
            f"{found.folder}: {found.form}, {found.precision}, weights {found.weights}; largest "
            f"difference of {found.output} {found.error:.1e} (of at most {found.largest:.1e}) on "
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
        "checkpoint", metavar="CHECKPOINT", help="checkpoint of featkd distill, or its URL"
    )
    text = "a folder that timm loads, safetensors for featkd, ONNX, or torch.export's format"
    parser.add_argument("--to", type=Form, required=True, help=text)
    parser.add_options_of(export_checkpoint, skip=("path", "form"))
    add_json(parser)
    add_quiet(parser)
    return parser
