"""Configuration of a diagnostics run: what is measured, on which features, and how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from featkd import linalg
from featkd.diagnostics.spectral_energy_pattern import SHARES
from featkd.models.export import exported_folder
from featkd.runtime import checks


def _check_at_least(least: int, config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are None or whole numbers >= `least`."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            checks.check_count(name, value, least)


@dataclass(frozen=True)
class Settings:
    """Definitions and sample sizes of the figures.

    Args:
        thresholds: shares of energy at which ranks and dimensions are taken.
        shares: shares of energy at which SEP frequencies are taken.
        sample: images whose features are kept, for rotation, bandwidth and permutations.
        permuted: images of the sample that the permutation test uses.
        permutations: random orders of the channels in the permutation test.
        k: dimensions of the subspaces that rotation compares (default: the median energy rank at
            the threshold nearest to 0.9).
        centred: subtract the data set's mean token before the PCA.
        seed: random seed of the sample, the permutations, the Gaussian tokens and random weights.

    Raises:
        ValueError: a field is out of its range.
    """

    thresholds: tuple[float, ...] = linalg.THRESHOLDS
    shares: tuple[float, ...] = SHARES
    sample: int = 64
    permuted: int = 16
    permutations: int = 100
    k: int | None = None
    centred: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("thresholds", "shares"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name}: expected at least one share, got none")
            checks.check_shares(name, values)
        _check_at_least(2, self, "sample")
        _check_at_least(1, self, "permuted", "permutations", "k")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 <= seed < 2**63, got {self.seed}")


@dataclass(frozen=True)
class DiagnoseConfig:
    """Configuration of `featkd.diagnostics.diagnose`.

    Set one source of feature maps: `features`, or `data` with `model`, or `data` with `student`
    and `teacher`. A model is a timm name, a checkpoint (.pt) of `featkd distill`, or a folder of
    `featkd export`. Without `out` nothing is written, and an interrupted run cannot be resumed.

    Args:
        model: model to measure: a timm name, a checkpoint of featkd distill, or a
            folder of featkd export.
        checkpoint: weights file of model, if that is a timm name.
        model_options: further timm arguments of model, as YAML or JSON.
        student: student of a pair: a timm name, a checkpoint of featkd distill, or a
            folder of featkd export.
        student_checkpoint: weights file of student, if that is a timm name.
        student_layers: layers of student (default: layers).
        student_options: further timm arguments of student, as YAML or JSON.
        teacher: teacher of a pair: a timm name, a checkpoint of featkd distill, or a
            folder of featkd export.
        teacher_checkpoint: weights file of teacher, if that is a timm name.
        teacher_layers: layers of teacher (default: layers).
        teacher_options: further timm arguments of teacher, as YAML or JSON.
        pretrained: load timm's weights for each timm name without a weights file.
        data: folder with images at any depth.
        features: folder of .npy, .npz or .safetensors files, one per image.
        allow_pickle: read object arrays; this executes code from the files.
        prefix_tokens: class and other extra tokens to remove from the front of the files' maps;
            auto: as few of 0, 1, 2 or 5 as leave a square number.
        out: folder for the report, the tables and the state of an interrupted run; it must not
            lie below data.
        layers: indices of the layers, as [0,-1] (default: all layers).
        images: maximum number of images, spread evenly over the folder (default: all images).
        batch_size: images per forward pass, or files read at once.
        img_size: image size in pixels (default: the model's; both models of a pair must agree).
        mean: pixel mean per channel (default: the model's, of a pair the teacher's).
        std: pixel standard deviation per channel (default: the model's, of a pair the teacher's).
        crop_pct: share of the image that the centre crop keeps (default: the model's, of a pair
            the teacher's).
        amp: precision of the models, float32 (off) or bfloat16 by autocast.
        device: auto, cpu, cuda or cuda:N.
        workers: image-loading processes, per process of torchrun.
        keep: precision of the features kept on disk for the second pass; never: compute them
            again, or, for feature files, omit the captured energies.
        budget_gib: maximum disk space in GiB for kept features, over all processes.
        on_bad: error stops at an unusable image; skip leaves it out.
        resume: auto continues from the state in out, if any; never starts again.
        save_seconds: minimum time between two saved states.
        settings: definitions and sample sizes of the figures.
        command: command line that the report shows (default: the call of `diagnose`).

    Raises:
        ValueError: a field is out of its range, or fields contradict each other.
        NotADirectoryError: `out` is a file.

    Examples:
        >>> DiagnoseConfig(student="deit_tiny_patch16_224", data="photos")
        Traceback (most recent call last):
        ValueError: model: expected features, model, or student and teacher; got student
    """

    model: str | None = None
    checkpoint: str | None = None
    model_options: dict[str, Any] | None = None
    student: str | None = None
    student_checkpoint: str | None = None
    student_layers: list[int] | None = None
    student_options: dict[str, Any] | None = None
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    teacher_layers: list[int] | None = None
    teacher_options: dict[str, Any] | None = None
    pretrained: bool = False
    data: str | None = None
    features: str | None = None
    allow_pickle: bool = False
    prefix_tokens: int | Literal["auto"] = "auto"
    out: str | None = None
    layers: list[int] | None = None
    images: int | None = None
    batch_size: int = 16
    img_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = None
    amp: Literal["off", "bf16"] = "off"
    device: str = "auto"
    workers: int = 2
    keep: Literal["fp32", "bf16", "never"] = "fp32"
    budget_gib: float = 8.0
    on_bad: Literal["error", "skip"] = "error"
    resume: Literal["auto", "never"] = "auto"
    save_seconds: float = 30.0
    settings: Settings = Settings()
    command: str | None = None

    def __post_init__(self) -> None:
        _check_at_least(1, self, "batch_size", "images")
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(
                    f"{name}: expected one of {', '.join(get_args(hint))}; got {value!r}"
                )
        for name in ("layers", "student_layers", "teacher_layers"):
            chosen = getattr(self, name)
            if chosen is not None and (not chosen or len(set(chosen)) < len(chosen)):
                raise ValueError(
                    f"{name}: expected at least one index, each only once; got {chosen}"
                )
        for name in ("budget_gib", "save_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        if self.settings.centred and self.student is not None:
            raise ValueError(
                "centred: got true together with a student, whose reach needs uncentred axes"
            )
        self._check_out()
        if self.features is not None:
            self._check_files()
        else:
            self._check_models()

    def _check_out(self) -> None:
        if self.out is None:
            return
        out = Path(self.out)
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"out: expected a folder, {out} is a file")
        if self.data is not None and out.resolve().is_relative_to(Path(self.data).resolve()):
            raise ValueError(
                f"out: expected a folder outside of data, {self.data}, because the next run would "
                f"read the report's figures as images; got {self.out}"
            )
        if self.features is not None and out.resolve() == Path(self.features).resolve():
            raise ValueError(f"out: expected another folder than features, got {out} for both")

    def _check_files(self) -> None:
        if self.models or self.data is not None:
            others = ", ".join(self.models or ["data"])
            raise ValueError(f"features: given together with {others}; give one of them")
        for name in ("checkpoint", "pretrained", "img_size", "mean", "std", "crop_pct"):
            if getattr(self, name):
                raise ValueError(f"{name}: given together with features, which need no model")

    def _check_models(self) -> None:
        if self.models not in (["model"], ["student", "teacher"]):
            raise ValueError(
                "model: expected features, model, or student and teacher; got "
                f"{', '.join(self.models) or 'none of them'}"
            )
        if self.data is None:
            raise ValueError("data: expected a folder of images for the model, got none")
        if self.pretrained and not any(map(self._takes_pretrained, self.models)):
            given = [self.weights_file(name) or getattr(self, name) for name in self.models]
            raise ValueError(
                "pretrained: expected a timm name without a weights file, got "
                f"{' and '.join(given)}"
            )

    @property
    def models(self) -> list[str]:
        """Names among "model", "student" and "teacher" that are set."""
        return [n for n in ("model", "student", "teacher") if getattr(self, n) is not None]

    @property
    def random_models(self) -> list[str]:
        """Names of the models that have random weights."""
        return [n for n in self.models if self._takes_pretrained(n) and not self.pretrained]

    def weights_file(self, name: str) -> str | None:
        """Weights file of "model", "student" or "teacher"."""
        file: str | None = getattr(self, "checkpoint" if name == "model" else f"{name}_checkpoint")
        return file

    def _takes_pretrained(self, name: str) -> bool:
        """Checks whether a model is a timm name without a weights file."""
        word = getattr(self, name)
        has_weights = word.endswith(".pt") or exported_folder(word) is not None
        return not (has_weights or self.weights_file(name))

    def describe(self) -> str:
        """The models and the images, or the folder of feature files, in words."""
        if self.features is not None:
            return f"feature files in {self.features}"
        names = []
        for name in self.models:
            label = "" if name == "model" else f"{name} "
            random = " (random weights)" if name in self.random_models else ""
            names.append(f"{label}{getattr(self, name)}{random}")
        return f"{' and '.join(names)} on the images in {self.data}"

    def call(self) -> str:
        """The Python call of `diagnose`, with the fields that differ from their defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"featkd.diagnostics.diagnose(DiagnoseConfig({', '.join(changed)}))"
