"""Helpers that compare outputs and gradients with float64, and tensors in other layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(generator: torch.Generator, *shape: int, scale: float = 1, mean: float = 0) -> Tensor:
    return mean + scale * torch.randn(shape, generator=generator)


def differentiate(
    function: Callable[..., Tensors],
    inputs: Tensors,
    upstream: Tensors,
    constant: tuple[str, ...] = (),
) -> Tensors:
    """Computes outputs by name, and gradients as "d_NAME".

    Args:
        function: takes the inputs by name and returns outputs by name.
        upstream: gradients of the used outputs.
        constant: inputs that need no gradient, in addition to integers.
    """
    needed = [n for n, x in inputs.items() if n not in constant and x.is_floating_point()]
    leaves = {n: x.detach().requires_grad_(n in needed) for n, x in inputs.items()}
    outputs = function(**leaves)
    gradients = torch.autograd.grad(
        [outputs[n] for n in upstream],
        [leaves[n] for n in needed],
        list(upstream.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    found = {f"d_{n}": gradient for n, gradient in zip(needed, gradients, strict=True)}
    return {n: x.detach() for n, x in outputs.items()} | found


def double(tensors: Tensors) -> Tensors:
    return {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    error = (got.double() - want.double()).norm()
    return float(error if not error else error / want.double().norm())


def assert_as_exact(got: Tensors, plain: Tensors, exact: Tensors) -> None:
    """Checks that errors are at most twice those of plain torch, plus a few roundings."""
    assert set(got) == set(plain) == set(exact)
    for name, want in exact.items():
        assert got[name].dtype == plain[name].dtype, name
        tiny = 1e-13 if got[name].dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
        allowed = 2 * relative(plain[name], want) + tiny
        error = relative(got[name], want)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def assert_same_bits(got: Tensors, want: Tensors) -> None:
    assert set(got) == set(want)
    for name, x in want.items():
        assert torch.equal(got[name], x), name


class Comparable:
    """Base of the test problems, with references in plain torch.

    A problem has `inputs(rows, others)`, `upstream(inputs)`, and its outputs by name as functions
    of the inputs: `fused` by featkd, `plain` by torch.
    """

    constant: ClassVar[tuple[str, ...]] = ()
    """Inputs without a gradient."""
    inputs: Callable[..., Tensors]
    upstream: Callable[[Tensors], Tensors]
    fused: Callable[..., Tensors]
    plain: Callable[..., Tensors]

    def run(
        self, inputs: Tensors, upstream: Tensors | None = None, by_torch: bool = False
    ) -> Tensors:
        """Outputs and gradients."""
        upstream = self.upstream(inputs) if upstream is None else upstream
        function = self.plain if by_torch else self.fused
        return differentiate(function, inputs, upstream, self.constant)

    def assert_exact(self, got: Tensors, inputs: Tensors, upstream: Tensors | None = None) -> None:
        upstream = self.upstream(inputs) if upstream is None else upstream
        exact = self.run(double(inputs), double(upstream), by_torch=True)
        assert_as_exact(got, self.run(inputs, upstream, by_torch=True), exact)

    def assert_exact_in_all_dtypes(self) -> None:
        for rows in DTYPES:
            for others in {rows, torch.float32} if rows != torch.float64 else {rows}:
                inputs = self.inputs(rows, others)
                self.assert_exact(self.run(inputs), inputs)

    def assert_repeats(self, inputs: Tensors) -> Tensors:
        """Checks that a second run gives the same bits and leaves the inputs; returns results."""
        before = {n: x.clone() for n, x in inputs.items()}
        once = self.run(inputs)
        assert_same_bits(self.run(inputs), once)
        assert_same_bits(inputs, before)
        return once

    def assert_repeats_and_scales(self, inputs: Tensors) -> None:
        """Checks also that gradients scale exactly with a power of two."""
        once = self.assert_repeats(inputs)
        eighth = self.run(inputs, {n: -0.125 * x for n, x in self.upstream(inputs).items()})
        assert_same_bits(eighth, {n: x * (-0.125 if n[:2] == "d_" else 1) for n, x in once.items()})


def views(x: Tensor) -> Tensors:
    """Views that are equal to x, with other strides."""
    wider = x.new_zeros(x.shape[0] * 2, *x.shape[1:-1], x.shape[-1] + 3)
    wider[::2, ..., 2:-1] = x
    return {"sliced": wider[::2, ..., 2:-1], "transposed": x.mT.contiguous().mT}


def spread(x: Tensor) -> Tensor:
    """A vector with stride 2."""
    return torch.stack((x, x.new_full(x.shape, 7)), 1)[:, 0]
