"""The variants of a case, and the check that they agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import featkd

from .problem import Case, Function, Problem, Tensors

VARIANTS = ("eager", "compile", "reference", "featkd")
"""Plain torch, torch.compile of it, torch.compile of featkd's own plain torch, and featkd."""

# relative L2 error against eager in the next wider dtype: above rounding in the case's dtype, and
# below the error of a missing term
_TOLERANCE = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.06}
_TOLERANCE |= {f"autocast-{dtype}": _TOLERANCE[dtype] for dtype in ("fp16", "bf16")}

_UPSTREAM = 1024.0  # as a GradScaler's: without it, gradients of large means underflow in fp16


class Disagreement(Exception):
    """Raised if two variants compute different results, whose times cannot be compared."""


@dataclass(frozen=True)
class Step:
    """Work to be timed: `run` is timed with the results of `prepare`, which is not."""

    prepare: Callable[[], tuple[Tensor, ...]]
    run: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def __call__(self) -> tuple[Tensor, ...]:
        return self.run(self.prepare())


def step_of(work: Callable[[], object]) -> Step:
    """Returns a step without preparation whose results are dropped."""

    def run(ready: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        work()
        return ready

    return Step(tuple, run)


@dataclass(frozen=True)
class Prepared:
    """The variants of a case on the same tensors."""

    case: Case
    steps: dict[str, Step]
    inputs: Tensors
    outputs: tuple[Tensor, ...]
    """Outputs of the forward pass, whatever the direction."""
    upstream: tuple[Tensor, ...]
    """Gradients of the outputs."""
    exact: tuple[Tensor, ...]
    """Eager's results in the next wider dtype: float32 for half precision, float64 for float32."""
    backend: str = ""
    """Backend of featkd's variant; "" if `prepare` did not run it."""
    errors: dict[str, float] = field(default_factory=dict)
    """Largest relative L2 error of each variant that `prepare` ran."""

    def check(self, variant: str, results: Sequence[Tensor]) -> float:
        """Returns the largest relative L2 error of a variant's outputs or gradients.

        Eager has no tolerance. In bf16 it sums the gradients of a norm over the rows in bf16, and
        is off by several per cent.

        Raises:
            Disagreement: an error is above the tolerance of the case's dtype.
        """
        names = self.case.problem.differentiable
        if self.case.direction == "forward":
            names = tuple(f"output {number}" for number in range(len(self.exact)))
        allowed = _TOLERANCE[self.case.dtype]
        errors = [_relative(x, y) for x, y in zip(results, self.exact, strict=True)]
        for name, error in zip(names, errors, strict=True):
            if variant != "eager" and not error <= allowed:  # also fails for NaN
                raise Disagreement(
                    f"{self.case.name}: {variant} differs from eager in {name} by {error:.1e} "
                    f"(relative L2), allowed {allowed:g}"
                )
        return max(errors)


def build(
    case: Case, variants: Sequence[str], device: torch.device, compiler: str = "inductor"
) -> Prepared:
    """Builds the variants of a case; none of them has run, and nothing is compiled yet."""
    problem = case.problem
    inputs = case.inputs(device)
    with torch.no_grad(), case.context(device):
        outputs = problem.eager(inputs)
    upstream = tuple(_upstream(x) for x in outputs)
    # guards of earlier cases count towards the limit after which dynamo silently runs eager
    torch.compiler.reset()
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=compiler)
    functions: dict[str, Function] = {
        "eager": problem.eager,
        "compile": compiled(problem.eager),
        "reference": compiled(_reference(problem)),
        "featkd": problem.featkd,
    }
    context = case.context(device)
    steps = {name: _step(case, functions[name], inputs, upstream, context) for name in variants}
    return Prepared(case, steps, inputs, outputs, upstream, _exact(case, inputs, upstream))


def prepare(case: Case, variants: Sequence[str], device: torch.device) -> Prepared:
    """Builds the variants of a case, runs each once (which compiles) and compares them.

    Raises:
        Disagreement: a variant's outputs or gradients differ from eager's.
    """
    built = build(case, variants, device)
    errors: dict[str, float] = {}
    backend = ""
    for name, step in built.steps.items():
        with warnings.catch_warnings():
            # inductor's, about the FFT of the spectral metric: its results are compared below
            warnings.filterwarnings("ignore", message=".*complex operators.*")
            results = step()
        if name == "featkd":
            backend = featkd.last_backend(case.problem.op) or ""
        errors[name] = built.check(name, results)
    return replace(built, backend=backend, errors=errors)


def _reference(problem: Problem) -> Function:
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
    generator = torch.Generator(output.device).manual_seed(1)
    drawn = torch.randn(output.shape, generator=generator, device=output.device)
    return drawn.to(output.dtype)


def _step(
    case: Case,
    function: Function,
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
        # output dtypes differ between variants: featkd's losses are float32 for half-precision maps
        grads = [g.to(y.dtype) for g, y in zip(upstream, ready, strict=True)]
        return torch.autograd.grad(ready, leaves, grads)

    if case.direction == "forward":
        return Step(tuple, forward)
    if case.direction == "backward":
        return Step(outputs, backward)
    return Step(tuple, lambda _: backward(outputs()))


def _relative(x: Tensor, y: Tensor) -> float:
    return float((x.to(y.dtype) - y).norm() / y.norm().clamp_min(1e-30))
