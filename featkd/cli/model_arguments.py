"""Models on the command line: checkpoints of `featkd distill`, and timm models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featkd.cli.arguments import Parser, UsageError, with_dashes
from featkd.runtime.names import printable

if TYPE_CHECKING:
    from featkd.data import DataConfig
    from featkd.models import FeatureModel

_OF_TIMM = ("checkpoint", "pretrained", "model_options")


@dataclass
class LoadedModel:
    """A model, its preprocessing and split folders, and the precision of its evaluation."""

    model: FeatureModel
    data: DataConfig
    amp: str
    weights: str
    note: str


@dataclass(frozen=True)
class ModelOptions:
    """Options that name models, and those of their forward passes.

    Args:
        checkpoints: checkpoints of featkd distill, or folders of featkd export.
        model: names of timm models.
        data: folder of the images.
        checkpoint: weights file of --model.
        model_options: further timm arguments of --model, as YAML or JSON.
        pretrained: load timm's weights of --model.
        weights: weights of a checkpoint: the last, their average, or the better of both.
        batch_size: images per forward pass.
        amp: precision; on a CPU fp16 is off (default: the checkpoint's; for a timm model off).
        device: auto, cpu, cuda or cuda:N.
        workers: image-loading processes.
        on_bad: error stops at an unreadable image; skip leaves it out.
        images: maximum number of images of a folder, spread evenly (default: all).

    Raises:
        UsageError: options contradict each other.
    """

    checkpoints: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    data: str = ""
    checkpoint: str | None = None
    model_options: dict[str, Any] | None = None
    pretrained: bool = False
    weights: Literal["auto", "model", "model_ema"] = "auto"
    batch_size: int = 64
    amp: Literal["off", "bf16", "fp16"] | None = None
    device: str = "auto"
    workers: int = 2
    on_bad: Literal["error", "skip"] = "error"
    images: int | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError(
                "name a checkpoint of featkd distill, or a timm model by --model NAME; got neither"
            )
        if not self.data:
            raise UsageError("--data: expected the folder with the images, as in --data DIR")
        check_count("batch_size", self.batch_size)
        check_count("images", self.images)
        if not self.model and (given := [x for x in _OF_TIMM if getattr(self, x)]):
            raise UsageError(
                with_dashes(f"--{given[0]}: expected --model NAME with it, got only a checkpoint")
            )
        if self.checkpoint is not None and (len(self.model) > 1 or self.pretrained):
            other = "--pretrained" if self.pretrained else f"{len(self.model)} models"
            raise UsageError(
                f"--checkpoint: expected one --model, without --pretrained; got {other}"
            )

    @property
    def names(self) -> list[str]:
        """The checkpoints, then the timm models."""
        return [*self.checkpoints, *self.model]


def add_models(parser: Parser) -> None:
    """Add the options of `ModelOptions`."""
    parser.add_argument(
        "checkpoints",
        type=str,
        nargs="*",
        metavar="CHECKPOINT",
        help="checkpoints (.pt) of featkd distill, their URLs, or folders of featkd export "
        "(default: none, with --model)",
    )
    parser.add_argument(
        "--model", type=str, nargs="+", default=[], help="timm models instead, or beside them"
    )
    parser.add_options_of(ModelOptions, skip=("checkpoints", "model"))


def check_count(name: str, value: int | None) -> None:
    """Raise UsageError if the value of an option is less than 1."""
    if value is not None and value < 1:
        raise UsageError(with_dashes(f"--{name}: expected >= 1, got {value}"))


def load_model(name: str, options: ModelOptions, device_type: str) -> LoadedModel:
    """Load one of `options.names`, on the CPU.

    Args:
        name: the checkpoint or the timm name.
        options: options of the models.
        device_type: type of the device that the model is to run on.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not a checkpoint of featkd.
        ValueError: timm has no such model, or its preprocessing is not supported.
    """
    from featkd.models.export import exported_folder, load_exported

    folder = exported_folder(name)
    if folder is not None:
        return _loaded(load_exported(folder), options, "exported")
    trained = name in options.checkpoints or name.endswith(".pt")
    loaded = (_load_trained if trained else _load_timm)(name, options)
    if loaded.amp == "fp16" and device_type == "cpu":
        loaded.amp = "off"
    return loaded


def _load_trained(name: str, options: ModelOptions) -> LoadedModel:
    """Load the student of a checkpoint, with the preprocessing and the splits of its recipe."""
    from featkd.data.config import HELD_OUT
    from featkd.train import checkpoint
    from featkd.train.trained import build_trained

    if "://" not in name and not Path(name).is_file():
        raise FileNotFoundError(
            f"no checkpoint {printable(name)}; expected a file of featkd distill, or a folder of "
            "featkd export; a timm model is --model NAME"
        )
    try:
        state = checkpoint.load(name)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(
            f"{error}; for the weights of a timm model use --model NAME --checkpoint FILE"
        ) from error
    model = build_trained(state, name, options.weights)
    recipe = state["recipe"]
    names = ("train_split", "val_split", "val_fraction", "first_label", "crop_pct")
    own = {key: recipe["data"][key] for key in names if key in recipe["data"]}
    if own["val_split"] is None and own.get("val_fraction") is None:  # without labels
        own["val_fraction"] = HELD_OUT
    return _loaded(model, options, options.weights, recipe.get("amp", "off"), **own)


def _load_timm(name: str, options: ModelOptions) -> LoadedModel:
    import torch

    from featkd.models import create_teacher

    timm_options = dict(options.model_options or {})
    file = options.checkpoint
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_teacher(name, options.pretrained, file, options.weights, **timm_options)
    weights = file or ("pretrained" if options.pretrained else "random")
    size = {key: timm_options[key] for key in ("img_size",) if key in timm_options}
    return _loaded(model, options, weights, **size)


def _loaded(
    model: FeatureModel, options: ModelOptions, weights: str, amp: str = "off", **own: Any
) -> LoadedModel:
    """Add the model's own preprocessing, with other fields of `own`."""
    from featkd.data import DataConfig
    from featkd.models.preprocessing import read_preprocessing

    found, note = read_preprocessing(model)
    data = DataConfig(
        path=options.data,
        workers=options.workers,
        on_bad_image=options.on_bad,
        **{**found, **own},
    )
    return LoadedModel(model, data, options.amp or amp, weights, note)
