"""The ways a case is computed, and the check that they agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import featkd

from .problem import Case, Problem, Tensors

VARIANTS = ("eager", "compile", "reference", "featkd")
"""Plain torch written for speed, torch.compile of it and of featkd's own plain torch, featkd."""

# relative L2 error against eager in the next wider type: wide enough for rounding in the case's
# type, narrow enough that a missing term shows
_TOLERANCE = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.06}
_TOLERANCE |= {f"autocast-{dtype}": _TOLERANCE[dtype] for dtype in ("fp16", "bf16")}

_UPSTREAM = 1024.0  # a GradScaler's: gradients of means over millions underflow in fp16 without


class Disagreement(Exception):
    """Two variants computed different things; their times would mean nothing."""


@dataclass(frozen=True)
class Step:
    """One variant of a case: `prepare` is not timed, `run` is, with what `prepare` returned."""

    prepare: Callable[[], tuple[Tensor, ...]]
    run: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def __call__(self) -> tuple[Tensor, ...]:
        return self.run(self.prepare())


@dataclass(frozen=True)
class Prepared:
    """A case with its variants ready to be timed: compiled, warm, and found to agree."""

    steps: dict[str, Step]
    inputs: Tensors
    outputs: tuple[Tensor, ...]
    """Of the forward pass, whatever the direction."""
    upstream: tuple[Tensor, ...]
    backend: str
    """The backend on which featkd's variant ran, "" without that variant."""
    errors: dict[str, float]
    """Of each variant: the largest relative L2 error among its outputs, or its gradients."""


def prepare(case: Case, variants: Sequence[str], device: torch.device) -> Prepared:
    """Build the variants of a case on the same tensors, run each, and compare.

    They are held against eager in the next wider type, float32 for half precision and float64 for
    float32. Eager itself has no tolerance: it is the measure, however coarsely it rounds (in bf16
    it sums a norm's gradients over the rows in bf16, which costs it several per cent).

    Raises:
        Disagreement: another variant's outputs or gradients are not the same.
    """
    problem = case.problem
    inputs = case.inputs(device)
    with torch.no_grad(), case.context(device):
        outputs = problem.eager(inputs)
    upstream = tuple(_upstream(x) for x in outputs)
    # guards of earlier cases count towards the limit after which dynamo silently runs eager
    torch.compiler.reset()
    functions = {
        "eager": problem.eager,
        "compile": torch.compile(problem.eager, fullgraph=True, dynamic=False),
        "reference": torch.compile(_reference(problem), fullgraph=True, dynamic=False),
        "featkd": problem.featkd,
    }
    steps = {
        name: _step(case, functions[name], inputs, upstream, case.context(device))
        for name in variants
    }
    want = _exact(case, inputs, upstream)
    errors: dict[str, float] = {}
    backend = ""
    for name, step in steps.items():
        with warnings.catch_warnings():
            # of inductor, about the spectral metric's FFT; the agreement below is what counts
            warnings.filterwarnings("ignore", message=".*complex operators.*")
            results = step()
        if name == "featkd":
            backend = featkd.last_backend(problem.op) or ""
        errors[name] = _largest_error(case, name, results, want)
    return Prepared(steps, inputs, outputs, upstream, backend, errors)


def _reference(problem: Problem) -> Callable[[Tensors], tuple[Tensor, ...]]:
    def run(tensors: Tensors) -> tuple[Tensor, ...]:
        with featkd.use_backend("reference"):
            return problem.featkd(tensors)

    return run


def _exact(case: Case, inputs: Tensors, upstream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = torch.float64 if case.dtype == "fp32" else torch.float32
    wide = {k: x.detach().to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    for name in case.problem.differentiable:
        wide[name].requires_grad_(case.direction != "forward")
    return _step(case, case.problem.eager, wide, upstream, nullcontext())()


def _upstream(output: Tensor) -> Tensor:
    if not output.dim():
        return torch.full_like(output, _UPSTREAM)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(output.shape, generator=generator)
    return drawn.to(output.device, output.dtype)


def _step(
    case: Case,
    function: Callable[[Tensors], tuple[Tensor, ...]],
    inputs: Tensors,
    upstream: tuple[Tensor, ...],
    context: AbstractContextManager[object],
) -> Step:
    leaves = [inputs[name] for name in case.problem.differentiable]

    def outputs() -> tuple[Tensor, ...]:
        with context:
            return function(inputs)

    def forward(_: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return outputs()

    def backward(ready: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # a variant's own output dtype: featkd's losses are float32 for half-precision maps
        grads = [g.to(y.dtype) for g, y in zip(upstream, ready, strict=True)]
        return torch.autograd.grad(ready, leaves, grads)

    def both(_: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return backward(outputs())

    def nothing() -> tuple[Tensor, ...]:
        return ()

    if case.direction == "forward":
        return Step(nothing, forward)
    if case.direction == "backward":
        return Step(outputs, backward)
    return Step(nothing, both)


def _largest_error(
    case: Case, variant: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]
) -> float:
    names = case.problem.differentiable
    if case.direction == "forward":
        names = tuple(f"output {number}" for number in range(len(want)))
    allowed = _TOLERANCE[case.dtype]
    errors = [_relative(x, y) for x, y in zip(got, want, strict=True)]
    for name, error in zip(names, errors, strict=True):
        if variant != "eager" and not error <= allowed:  # NaN included
            raise Disagreement(
                f"{case.name}: {variant} differs from eager in {name} by {error:.1e} "
                f"(relative L2), allowed {allowed:g}"
            )
    return max(errors)


def _relative(x: Tensor, y: Tensor) -> float:
    return float((x.to(y.dtype) - y).norm() / y.norm().clamp_min(1e-30))
