"""Exports a model for use elsewhere: a folder for timm, safetensors, ONNX or torch.export.

Every exported folder has a config.json in timm's format, with an entry "featkd" for what timm does
not know: the recipe, the scores and the files.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor, nn

from featkd.models.base import build_timm
from featkd.models.features import FeatureModel, evaluating, with_features
from featkd.runtime.files import sync_folder
from featkd.runtime.names import listed

Form = Literal["safetensors", "timm", "onnx", "pt2"]
Precision = Literal["fp32", "fp16"]
Forward = Callable[[Tensor], Tensor]

_FILES: Mapping[Form, str] = {
    "safetensors": "model.safetensors",
    "timm": "model.safetensors",
    "onnx": "model.onnx",
    "pt2": "model.pt2",
}
# Largest error, as a share of the largest output if that is above 1. safetensors and timm run the
# same operators; a traced graph may order them differently.
_TOLERANCES: Mapping[Form, float] = {"safetensors": 1e-6, "timm": 1e-6, "onnx": 1e-4, "pt2": 1e-5}
_FP16_TOLERANCE = 0.05
_ONNX_LIMIT = 2**31 - 2**24  # bytes of weights that one ONNX file can hold


class ExportError(RuntimeError):
    """A model can't be exported, or the exported model's outputs differ."""


@dataclass(frozen=True)
class Exported:
    """An exported model and its comparison with the original.

    Attributes:
        folder: folder that was written.
        form: "safetensors", "timm", "onnx" or "pt2".
        precision: "fp32" or "fp16".
        output: "logits", or "features" of a model without a classifier.
        error: largest absolute difference of the outputs.
        largest: largest absolute output of the original.
        images: number of images compared, in one batch and the first one alone.
    """

    folder: str
    form: Form
    precision: Precision
    output: str
    error: float
    largest: float
    images: int


def export_model(
    model: FeatureModel,
    form: Form,
    out: str | os.PathLike[str],
    images: Tensor,
    *,
    precision: Precision = "fp32",
    details: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> Exported:
    """Writes a model to a folder, after a comparison of the written model with `model`.

    The folder appears whole or not at all.

    Args:
        model: a timm model in float32 on the CPU. Its `pretrained_cfg` describes the images and
            the classes.
        form: "timm": config.json and model.safetensors, which `timm.create_model("local-dir:OUT",
            pretrained=True)` loads, and README.md if `card` is given. Lift and WideLast students
            need `import featkd.models` before. "safetensors": the same files without a card, for
            `load_exported`. "onnx": model.onnx. "pt2": model.pt2, for `torch.export.load`.
            The last two have a dynamic batch size and need no featkd.
        out: a new or an empty folder.
        images: (B, C, H, W), preprocessed; they are compared as one batch and the first one alone.
        precision: "fp16" runs an ONNX model in float16; its inputs and outputs remain float32.
        details: plain values that config.json stores as "featkd".
        card: text of README.md.

    Raises:
        ValueError: an argument is out of range, or `out` has files in it.
        ImportError: a package of `featkd[export]` is missing.
        ExportError: torch can't export the model, or the outputs differ. Nothing is written.
    """
    check_request(form, out, precision)
    folder, module = Path(out), cast(nn.Module, model)
    name = "logits" if getattr(model, "num_classes", 1) else "features"
    with evaluating(model), _replacing(folder) as partial:
        _write_config(module, form, partial, {**(details or {}), "output": name})
        if form in ("onnx", "pt2"):
            _write_graph(module, form, images, partial / _FILES[form], name, precision)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        error, largest = _compare(module, _open(form, partial), images)
        allowed = _FP16_TOLERANCE if precision == "fp16" else _TOLERANCES[form]
        if not error <= allowed * max(1.0, largest):
            raise ExportError(
                f"--to {form}: the exported model's {name} differ from the checkpoint's by "
                f"{error:.1e} (largest {largest:.1e}); allowed: {allowed:.0e} of the largest; "
                "nothing was written"
            )
    return Exported(str(folder), form, precision, name, error, largest, len(images))


def check_request(form: Form, out: str | os.PathLike[str], precision: Precision = "fp32") -> None:
    """Checks the arguments of an export and its packages, before a model is loaded; see there."""
    if form not in get_args(Form):
        raise ValueError(f"to: expected one of {', '.join(get_args(Form))}; got {form!r}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision: expected fp32 or fp16, got {precision!r}")
    if precision == "fp16" and form != "onnx":
        raise ValueError(f"precision: got fp16 with --to {form}; only onnx allows it")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, expected a new or an empty folder")
    if folder.is_dir() and (found := sorted(path.name for path in folder.iterdir())):
        raise ValueError(
            f"out: {folder} has files in it ({listed(found, 3)}); expected a new or an empty folder"
        )
    for package in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(
                f"--to onnx: needs {package}, which is not installed: "
                "pip install '/path/to/featkd[export]'"
            ) from error


def exported_folder(word: str) -> Path | None:
    """Returns the folder that a model's name stands for: "local-dir:DIR", or the path of a folder.

    None for other names, timm's included.
    """
    if word.startswith("local-dir:"):
        return Path(word.removeprefix("local-dir:"))
    return Path(word) if Path(word).is_dir() and not timm.is_model(word) else None


def load_exported(folder: str | os.PathLike[str]) -> FeatureModel:
    """Loads a model that `export_model` wrote as safetensors or for timm, or timm's `save_for_hf`.

    Returns:
        The model, on the CPU, in evaluation mode. Its `pretrained_cfg` describes the images and
        the classes.

    Raises:
        FileNotFoundError: the folder has no config.json, or no weights.
        ValueError: timm can't build the model, or the weights don't fit.
    """
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise FileNotFoundError(
            f"{place}: no config.json there; expected a folder of `featkd export --to timm` or "
            "--to safetensors"
            + (f", or the checkpoint {place / 'best.pt'}" if (place / "best.pt").is_file() else "")
        )
    if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in place.iterdir()):
        raise FileNotFoundError(
            f"{place}: no model.safetensors there; expected a folder of `featkd export --to timm` "
            "or --to safetensors (those of onnx and pt2 hold no timm model)"
        )
    try:
        model = build_timm(f"local-dir:{place}", pretrained=True)
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{place}: timm can't load this model: {reason[:300]}") from error
    return cast(FeatureModel, with_features(model).eval())


class _HalfPrecision(nn.Module):
    """A copy of a model in float16, with float32 images and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images.half()).float())


def _write_config(model: nn.Module, form: Form, folder: Path, details: Mapping[str, Any]) -> None:
    """Writes config.json, and the weights for the forms that read them."""
    extra: dict[str, Any] = {"featkd": {"form": form, "file": _FILES[form], **details}}
    names = cast(Any, model).pretrained_cfg.get("label_names")
    if names:
        extra["label_names"] = list(names)
    save_for_hf(model, folder, model_config=extra, safe_serialization=True)
    if _FILES[form] != "model.safetensors":
        (folder / "model.safetensors").unlink()


def _write_graph(
    model: nn.Module, form: Form, images: Tensor, path: Path, output: str, precision: Precision
) -> None:
    """Writes model.onnx or model.pt2, with a dynamic batch size."""
    # torch can't make a batch of one dynamic
    example = (images[:2] if len(images) > 1 else images.expand(2, -1, -1, -1).contiguous(),)
    shapes = ({0: torch.export.Dim("batch")},)
    program: Any = None
    try:
        if form == "pt2":
            program = torch.export.export(model, example, dynamic_shapes=shapes)
        else:
            module = _HalfPrecision(model) if precision == "fp16" else model
            size = sum(x.numel() * x.element_size() for x in module.state_dict().values())
            torch.onnx.export(
                module,
                example,
                path,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["images"],
                output_names=[output],
                external_data=size > _ONNX_LIMIT,
                verbose=False,
            )
    except Exception as error:  # of any type; their texts can be pages
        text = " ".join(str(error).split())[:300]
        raise ExportError(
            f"torch can't export this model: {type(error).__name__}: {text}; nothing was written"
        ) from error
    if program is not None:
        torch.export.save(program, path)


def _open(form: Form, folder: Path) -> Forward:
    """Loads an exported model as its users do."""
    path = folder / _FILES[form]
    if form == "pt2":
        return cast(Forward, torch.export.load(path).module())
    if form != "onnx":
        return load_exported(folder)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


def _compare(model: nn.Module, exported: Forward, images: Tensor) -> tuple[float, float]:
    """Returns the largest absolute difference of the outputs, and the largest absolute output."""
    errors, sizes = [], []
    for batch in (images, images[:1]):
        want, found = model(batch), exported(batch)
        if not want.isfinite().all():
            raise ExportError("the checkpoint's own outputs are not finite; nothing was written")
        same = found.shape == want.shape and bool(found.isfinite().all())
        errors.append((found - want).abs().max().item() if same else math.inf)
        sizes.append(want.abs().max().item())
    return max(errors), max(sizes)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder` that becomes `folder` if the block succeeds."""
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # of an export that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder.parent)
