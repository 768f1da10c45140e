"""Shared parts of the ops: choice of the backend, matrix products, registration."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.ops import backends

MOST_ROWS = 2**31 - 2**16  # the end of a loop over tiles must fit 32 bits
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_library: Any = torch.library.Library("featkd", "FRAGMENT")  # type: ignore[no-untyped-call]


def choose(
    name: str, tensors: Iterable[Tensor | None], why_not: Callable[[], str] = lambda: ""
) -> str:
    """Chooses and records the backend of a call; a graph for export uses the reference.

    Args:
        name: name of the op in `featkd.functional`.
        tensors: tensors that a kernel would read; the first one is not None.
        why_not: returns the reason if the kernels do not support the call, otherwise "".
    """
    first, *others = tensors
    assert first is not None
    if is_being_exported():
        return "reference"

    def unsupported() -> str:
        if torch._C._are_functorch_transforms_active():
            return "torch.func transforms"
        for x in (first, *others):
            if x is not None and x.is_floating_point() and x.dtype not in DTYPES:
                return f"a tensor in {x.dtype}"
        from featkd.kernels.launch import can_run_on

        if not can_run_on(first.device):
            return f"Triton kernels cannot run on tensors on {first.device.type}"
        return why_not()

    chosen = backends.choose(name, first.device, unsupported)
    backends.record(name, chosen)
    return chosen


def too_many_rows(x: Tensor) -> str:
    """Returns the reason if a map (B, N, C) has too many rows for 32 bits, otherwise ""."""
    count = x.shape[0] * x.shape[1]
    return f"{count} tokens, not below {MOST_ROWS}" if count >= MOST_ROWS else ""


def is_being_exported() -> bool:
    """Checks whether a graph is traced for export: it may hold torch's own operators only."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return bool(torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or tracing)


# Dynamo calls the function while it traces: torch 2.11 would replace is_exporting by True
is_being_exported._dynamo_marked_constant = True  # type: ignore[attr-defined]


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x W^T + b with parameters in x's dtype, or in autocast's if it is on."""
    cast = x.dtype == torch.float64 or not is_autocast_on(x)

    def fitting(p: Tensor) -> Tensor:  # autocast does not cast float64
        return p.to(x.dtype) if cast or p.dtype == torch.float64 else p

    return F.linear(x, fitting(weight), None if bias is None else fitting(bias))


def is_autocast_on(x: Tensor) -> bool:
    """Checks whether autocast is on for x's device; the meta device has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def define(
    schema: str,
    kernel: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Registers a custom op in the namespace featkd; returns a function that calls it.

    If nothing traces the call, the function runs the implementation in a plain autograd function:
    a custom op and its gradients take the host twice as long.

    Args:
        schema: name and schema, as for `torch.library.define`.
        kernel: module and function of featkd.kernels that take the arguments, "soft_kd:forward";
            imported at the first call, because kernels need Triton.
        fake: implementation for fake tensors: shapes and dtypes only.
        backward, setup_context: as for `torch.library.register_autograd`; without them,
            differentiating the op is an error.
    """
    name = schema.partition("(")[0]

    @cache
    def implementation() -> Callable[..., Any]:
        found: Callable[..., Any] = pkgutil.resolve_name(f"featkd.kernels.{kernel}")
        return found

    def run(*arguments: Any) -> Any:
        return implementation()(*arguments)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"featkd::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"featkd::{name}", backward or _refuse, setup_context=setup_context, lib=_library
    )
    op = getattr(torch.ops.featkd, name).default
    setup: Callable[..., None] = setup_context or (lambda ctx, inputs, output: None)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            # no setup_context method: torch would inspect the signature of forward at each call
            output = run(*arguments)
            setup(ctx, arguments, output)
            return output

    Function.__name__ = name
    Function.backward = staticmethod(backward or _refuse)  # type: ignore[method-assign]

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _are_plain(arguments):
            return op(*arguments)
        if not torch.is_grad_enabled():
            return run(*arguments)
        return Function.apply(*arguments)

    return call


def _are_plain(arguments: Iterable[Any]) -> bool:
    """Checks that no dispatch mode, transform or tensor subclass must see the op."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    kinds = (torch.Tensor, torch.nn.Parameter)
    return all(
        # is_grads_batched uses a vmap of its own
        type(x) in kinds and not torch._C._functorch.is_legacy_batchedtensor(x)
        for x in arguments
        if isinstance(x, torch.Tensor)
    )


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "featkd's gradients cannot be differentiated again; "
        'use featkd.use_backend("reference") for second derivatives'
    )
