"""Models on the command line: checkpoints of `featkd distill`, and timm models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from featkd.cli.arguments import Parser, UsageError
from featkd.runtime.names import printable

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from featkd.data import DataConfig
    from featkd.models import FeatureModel

_Amp = Literal["off", "bf16", "fp16"]
_OF_TIMM = ("checkpoint", "pretrained", "model_options")


@dataclass
class LoadedModel:
    """A model, its preprocessing and split folders, and the precision of its evaluation."""

    model: FeatureModel
    data: DataConfig
    amp: str
    weights: str


def add_models(parser: Parser) -> None:
    """Add the options that name models, and those of their forward passes."""
    parser.add_argument(
        "checkpoints",
        type=str,
        nargs="*",
        metavar="CHECKPOINT",
        help="checkpoints (.pt) of featkd distill, their URLs, or folders of featkd export",
    )
    parser.add_argument(
        "--model", type=str, nargs="+", default=[], help="timm models instead, or beside them"
    )
    parser.add_argument(
        "--checkpoint", type=str | None, default=None, help="weights file of --model"
    )
    parser.add_argument(
        "--model-options",
        type=dict[str, Any] | None,
        default=None,
        help="further timm arguments of --model, as YAML or JSON",
    )
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights of --model")
    parser.add_argument(
        "--weights",
        type=Literal["auto", "model", "model_ema"],
        default="auto",
        help="weights of a checkpoint: the last, their average, or the better of both",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass")
    parser.add_argument(
        "--amp",
        type=_Amp | None,
        default=None,
        metavar="|".join(get_args(_Amp)),
        help="precision; on a CPU fp16 is off (default: the checkpoint's; for a timm model off)",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, default=2, help="image-loading processes")
    parser.add_argument(
        "--on-bad",
        type=Literal["error", "skip"],
        default="error",
        help="error stops at an unreadable image; skip leaves it out",
    )
    parser.add_argument(
        "--images",
        type=int | None,
        default=None,
        help="maximum number of images of a folder, spread evenly (default: all)",
    )


def check_models(args: Namespace) -> None:
    """Raise UsageError if the options of `add_models` or `--data` contradict each other."""
    if not (args.checkpoints or args.model):
        raise UsageError(
            "name a checkpoint of featkd distill, or a timm model by --model NAME; got neither"
        )
    if args.data is None:
        raise UsageError("--data: expected the folder with the images, as in --data DIR")
    for name in ("batch_size", "images"):
        check_count(args, name)
    if not args.model and (given := [x for x in _OF_TIMM if args[x]]):
        raise UsageError(f"--{given[0]}: expected --model NAME with it, got only a checkpoint")
    if args.checkpoint is not None and (len(args.model) > 1 or args.pretrained):
        other = "--pretrained" if args.pretrained else f"{len(args.model)} models"
        raise UsageError(f"--checkpoint: expected one --model, without --pretrained; got {other}")


def check_count(args: Namespace, name: str) -> None:
    """Raise UsageError if an option is less than 1."""
    if args[name] is not None and args[name] < 1:
        raise UsageError(f"--{name}: expected >= 1, got {args[name]}")


def load_model(name: str, args: Namespace, device_type: str) -> LoadedModel:
    """Load one of `args.checkpoints` or `args.model`, on the CPU.

    Args:
        name: the checkpoint or the timm name.
        args: parsed options of `add_models`, `data` among them.
        device_type: type of the device that the model is to run on.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not a checkpoint of featkd.
        ValueError: timm has no such model, or its preprocessing is not supported.
    """
    from featkd.models.export import exported_folder, load_exported

    folder = exported_folder(name)
    if folder is not None:
        model = load_exported(folder)
        return LoadedModel(model, _preprocessing(model, args), args.amp or "off", "exported")
    trained = name in args.checkpoints or name.endswith(".pt")
    loaded = (_load_trained if trained else _load_timm)(name, args)
    if loaded.amp == "fp16" and device_type == "cpu":
        loaded.amp = "off"
    return loaded


def _load_trained(name: str, args: Namespace) -> LoadedModel:
    """Load the student of a checkpoint, with the preprocessing and the splits of its recipe."""
    from featkd.data.config import HELD_OUT
    from featkd.train import checkpoint
    from featkd.train.trained import load_trained

    if "://" not in name and not Path(name).is_file():
        raise FileNotFoundError(f"no checkpoint {printable(name)}")
    try:
        recipe = checkpoint.load(name)["recipe"]
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(
            f"{error}; for the weights of a timm model use --model NAME --checkpoint FILE"
        ) from error
    model = load_trained(name, args.weights)
    names = ("train_split", "val_split", "val_fraction", "first_label", "crop_pct")
    own = {key: recipe["data"][key] for key in names if key in recipe["data"]}
    if own["val_split"] is None and own.get("val_fraction") is None:  # without labels
        own["val_fraction"] = HELD_OUT
    data = _preprocessing(model, args, **own)
    return LoadedModel(model, data, args.amp or recipe.get("amp", "off"), args.weights)


def _load_timm(name: str, args: Namespace) -> LoadedModel:
    import torch

    from featkd.models import create_teacher

    options = dict(args.model_options or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_teacher(name, args.pretrained, args.checkpoint, args.weights, **options)
    weights = args.checkpoint or ("pretrained" if args.pretrained else "random")
    size = {key: options[key] for key in ("img_size",) if key in options}
    return LoadedModel(model, _preprocessing(model, args, **size), args.amp or "off", weights)


def _preprocessing(model: Any, args: Namespace, **own: Any) -> DataConfig:
    """Preprocessing that timm's record of a model describes, with other fields of `own`."""
    from timm.data import resolve_model_data_config

    from featkd.data import DataConfig

    found = resolve_model_data_config(model)
    if found["crop_mode"] != "center":
        raise ValueError(
            f"crop_mode: expected a model with crop_mode center, got {found['crop_mode']}"
        )
    fields = {
        "path": args.data,
        "img_size": found["input_size"][-1],
        "mean": tuple(found["mean"]),
        "std": tuple(found["std"]),
        "crop_pct": found["crop_pct"],
        "interpolation": found["interpolation"],
        "workers": args.workers,
        "on_bad_image": args.on_bad,
    }
    return DataConfig(**{**fields, **own})
