"""torch.compile and export: plain operators on a CPU, custom ops with the Triton backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

import featkd
from tests.ops.test_autograd import CALLS, randn


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def compiled(op: str) -> tuple[Callable[[Tensor], Tensor], list[str]]:
    """Compiles a function that calls an op; returns it and the list of its traced graphs."""
    graphs: list[str] = []

    def look(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.code))
        return aot_eager(graph, inputs)

    return torch.compile(lambda x: 2 * CALLS[op](x.sin()), backend=look, fullgraph=True), graphs


def grad(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, and gradient of the sum of its squares."""
    x = x.detach().requires_grad_()
    output = function(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), x)]


@pytest.mark.parametrize("op", CALLS)
def test_cpu_graph_has_no_custom_ops(op):
    function, graphs = compiled(op)
    x = randn(3, 12, 12)
    want = grad(lambda x: 2 * CALLS[op](x.sin()), x)
    for ours, theirs in zip(grad(function, x), want, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert graphs
    assert not any("ops.featkd" in graph for graph in graphs)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.usefixtures("triton")
def test_triton_graph_has_custom_ops(op, executed):
    function, graphs = compiled(op)
    x = randn(3, 12, 12)
    got = grad(function, x)
    assert featkd.last_backend(op) == "triton"
    assert len(executed) >= 2
    name = {"soft_kd": "soft_kd", "widelast_projection": "two_layer_norms"}
    assert f"ops.featkd.{name.get(op, 'feature_distance')}" in graphs[0]
    for ours, theirs in zip(got, grad(lambda x: 2 * CALLS[op](x.sin()), x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", ["projected_feature_kd", "widelast_projection"])
@pytest.mark.usefixtures("triton")
def test_export_has_no_custom_ops(op, launched):
    class Module(torch.nn.Module):
        def forward(self, x):
            return CALLS[op](x)

    program = torch.export.export(Module(), (randn(3, 12, 12),))
    assert not [n for n in program.graph.nodes if "featkd" in str(n.target)]
    assert launched == []
    x = randn(3, 12, 12, seed=5)
    with featkd.use_backend("reference"):
        torch.testing.assert_close(program.module()(x), CALLS[op](x))
