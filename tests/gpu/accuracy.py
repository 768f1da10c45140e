"""Accuracy: outputs and gradients have at most twice the error of plain torch in that dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import featkd

from .forms import FORMS, Draw, Form, Sizes, Tensors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Precision:
    """Dtypes of the student and the parameters, of the teacher, and of autocast (None: off)."""

    student: torch.dtype
    teacher: torch.dtype
    autocast: torch.dtype | None = None

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)

    @property
    def is_half(self) -> bool:
        return self.student in (BF16, FP16) or self.autocast is not None


PRECISIONS = {
    "fp32": Precision(FP32, FP32),
    "bf16": Precision(BF16, BF16),
    "fp16": Precision(FP16, FP16),
    "autocast-bf16": Precision(FP32, BF16, BF16),
    "autocast-fp16": Precision(FP32, FP16, FP16),
}
_GRID = (7, 7)
# published and other usual widths, the narrowest and widest supported ones, and odd ones
_WIDTHS = ((384, 1024), (768, 1024), (1024, 1280), (24, 16), (192, 1664), (33, 65), (50, 100))
_GRIDS = (7, 14, 16, 37)
MAPS = (
    *(Sizes(2, (side, side), 192, 384) for side in _GRIDS),
    *(Sizes(3, _GRID, *widths) for widths in _WIDTHS),
    Sizes(2, (5, 9), 40, 72),
    Sizes(1, (1, 1), 192, 384),
)
LOGITS = tuple(
    Sizes(batch, (1, 1), classes, classes)
    for batch, classes in ((32, 1000), (1, 10), (7, 1003), (3, 21841), (300, 100))
)
SMALL = {False: (Sizes(2, (3, 4), 24, 40), Sizes(3, (2, 5), 7, 9)), True: LOGITS[1:3]}

# smaller errors of sums, and of scalars, whose rounding errors cancel, are chance
_FLOOR = {False: 2e-6, True: 1e-4}
_SCALAR_FLOOR = {False: 2e-6, True: 5e-4}
UPSTREAM = 1404.0  # as a GradScaler's: without it, gradients of large means underflow in fp16


@dataclass(frozen=True)
class Case:
    """A form at one size in one precision."""

    form: Form
    sizes: Sizes
    precision: str

    def __str__(self) -> str:
        return f"{self.form}/{self.sizes}/{self.precision}"


@dataclass(frozen=True)
class Error:
    """Relative L2 error of an output or a gradient."""

    name: str
    error: float
    eager: float
    allowed: float
    bias: float
    """Mean of the signed error / root mean square of the exact values."""


def sizes_of(form: Form, *, small: bool = False) -> tuple[Sizes, ...]:
    """Returns the sizes at which a form is checked."""
    logits = form.op == "soft_kd"
    return SMALL[logits] if small else LOGITS if logits else MAPS


def cases(*, small: bool = False) -> Iterator[Case]:
    """Yields every form at every size in every precision; `small` for a CPU."""
    for form in FORMS.values():
        for precision in ("fp32", "bf16", "autocast-bf16") if small else PRECISIONS:
            for sizes in sizes_of(form, small=small):
                yield Case(form, sizes, precision)


def inputs_of(form: Form, sizes: Sizes, precision: Precision, device: torch.device) -> Tensors:
    """Draws the inputs, equal in every call; the differentiated ones are leaves."""
    generator = torch.Generator().manual_seed(0)
    tensors = form.inputs(sizes, Draw(generator, device, precision.student, precision.teacher))
    return leaves_of(form, tensors)


def leaves_of(form: Form, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Returns detached tensors, in another dtype if given; the differentiated ones are leaves."""
    found = {}
    for name, x in tensors.items():
        x = x.detach()
        if dtype is not None and x.is_floating_point():
            x = x.to(dtype)
        found[name] = x.requires_grad_(name not in form.constant)
    return found


def upstream_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns gradients of the outputs that every dtype represents exactly."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for y in outputs:
        drawn = torch.randn(y.shape, generator=generator).bfloat16() if y.dim() else UPSTREAM
        found.append(torch.as_tensor(drawn).to(y.device, y.dtype))
    return found


def results(
    form: Form,
    tensors: Tensors,
    outputs: tuple[Tensor, ...],
    upstream: list[Tensor] | None = None,
) -> Tensors:
    """Returns outputs and gradients by name."""
    names = [name for name in tensors if name not in form.constant]
    gradients = torch.autograd.grad(
        outputs, [tensors[name] for name in names], upstream or upstream_of(outputs)
    )
    found = {f"output{number}": y.detach() for number, y in enumerate(outputs)}
    return found | {f"d_{name}": g for name, g in zip(names, gradients, strict=True)}


def backend_on(device: torch.device) -> str:
    """Returns the backend that has to run on the device."""
    return "triton" if device.type == "cuda" else "reference"


def run_ours(
    form: Form, tensors: Tensors, sizes: Sizes, precision: Precision | None = None
) -> Tensors:
    """Runs the public function; raises if it ran on another backend."""
    device = next(iter(tensors.values())).device
    wanted = "auto" if device.type == "cuda" else "reference"
    context = nullcontext() if precision is None else precision.context(device)
    with featkd.use_backend(wanted), context:
        outputs = form.ours(tensors, sizes)
    ran = featkd.last_backend(form.op)
    assert ran == backend_on(device), f"{form.op} ran on {ran}, not on {backend_on(device)}"
    return results(form, tensors, outputs)


def exact(form: Form, tensors: Tensors, sizes: Sizes) -> Tensors:
    """Runs the plain form in float64."""
    wide = leaves_of(form, tensors, torch.float64)
    return results(form, wide, form.plain(wide, sizes))


def relative(got: Tensor, want: Tensor) -> float:
    """Returns the relative L2 error."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def measure(case: Case, device: torch.device) -> list[Error]:
    """Returns the errors of a case; raises if two runs differ, or if an input was modified."""
    form, sizes, precision = case.form, case.sizes, PRECISIONS[case.precision]
    tensors = inputs_of(form, sizes, precision, device)
    want = exact(form, tensors, sizes)
    with precision.context(device):
        outputs = form.plain(tensors, sizes)
    eager = results(form, tensors, outputs)
    got = run_ours(form, tensors, sizes, precision)
    again = run_ours(form, tensors, sizes, precision)
    for name, x in inputs_of(form, sizes, precision, device).items():
        assert torch.equal(x, tensors[name]), f"{name} was modified"
    found = []
    for name, x in want.items():
        assert torch.equal(got[name], again[name]), f"{name} does not repeat bitwise"
        if name.startswith("d_"):
            source = tensors[name.removeprefix("d_")]
            assert (got[name].dtype, got[name].shape) == (source.dtype, source.shape), name
        floor = (_FLOOR if x.dim() else _SCALAR_FLOOR)[precision.is_half]
        theirs = relative(eager[name], x)
        # if eager overflows, its error allows nothing: a fixed bound takes its place
        allowed = 2 * theirs + floor if math.isfinite(theirs) else 0.05
        scale = x.square().mean().sqrt().clamp_min(1e-300)
        bias = float((got[name].double() - x).mean() / scale)
        found.append(Error(name, relative(got[name], x), theirs, allowed, bias))
    return found


def check(case: Case, device: torch.device) -> list[Error]:
    """Returns the errors of `measure`.

    Raises:
        AssertionError: an error is larger than allowed, or NaN.
    """
    errors = measure(case, device)
    wrong = [e for e in errors if not (e.error <= e.allowed and abs(e.bias) <= e.allowed)]
    assert not wrong, "; ".join(
        f"{e.name}: error {e.error:.2e}, bias {e.bias:.1e}, allowed {e.allowed:.2e} "
        f"(eager {e.eager:.2e})"
        for e in wrong
    )
    return errors
