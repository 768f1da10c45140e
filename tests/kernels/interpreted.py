"""Tests the kernels in float64, in a separate process with TRITON_INTERPRET=1.

python -m tests.kernels.interpreted
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.language.core import is_builtin
from triton.runtime import interpreter

import featkd
from featkd.kernels import feature_distance, soft_kd, two_layer_norms
from tests.ops import feature_cases, norms_cases, soft_kd_cases
from tests.ops.comparing import Comparable

FEATURES = [
    feature_cases.Problem(9, 15, 40, 5, student=6, bias=True),
    feature_cases.Problem(3, 8, 24, 4, student=5, pooled=True),
    feature_cases.Problem(9, 45, 300, student=5, teacher=False, pooled=True),
    feature_cases.Problem(3, 9, 33, norm="weight"),
    feature_cases.Problem(5, 12, 36, 4, norm="none"),
]
NORMS = [
    norms_cases.Problem(3, 19, 5, 300),
    norms_cases.Problem(1, 3, 5, 7, ("normed",)),
    norms_cases.Problem(1, 3, 5, 7, ("residual",)),
]
LOGITS = [
    soft_kd_cases.Problem(7, 33),
    soft_kd_cases.Problem(5, 33, 0.3, 1.7, soft=True),
    soft_kd_cases.Problem(3, 4096, 0.5, 1.7),  # the longest row of one block
    soft_kd_cases.Problem(2, 4096, 0.3, 1.0, soft=True),
    soft_kd_cases.Problem(3, 5000, 0.5, 1.7),
]


def check_feature_distance() -> None:
    feature_distance.processors = lambda device: 1  # so that a program has several images and tiles
    check(FEATURES)
    for width in (0, 2, 3):
        gradcheck(feature_cases.Problem(2, 6, 5, width, student=3, pooled=True))


def check_two_layer_norms() -> None:
    two_layer_norms.processors = lambda device: 1
    check(NORMS)
    gradcheck(NORMS[1])


def check_soft_kd() -> None:
    assert soft_kd.config(4096, torch.float64).block == 4096
    check(LOGITS)
    small = [soft_kd_cases.Problem(3, 5, 0.3, 1.7, soft) for soft in (False, True)]
    for problem in small:
        gradcheck(problem)
    soft_kd.config = lambda *_: soft_kd.Config(2, 4, num_warps=1)
    check(small[1:])


def check(problems: Sequence[Comparable]) -> None:
    for problem in problems:
        inputs = problem.inputs(torch.float64)
        problem.assert_exact(problem.run(inputs), inputs)


def gradcheck(problem: Comparable) -> None:
    inputs = problem.inputs(torch.float64)
    constant = problem.constant
    names = [n for n, x in inputs.items() if n not in constant and x.is_floating_point()]

    def outputs(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = problem.fused(**inputs | dict(zip(names, leaves, strict=True)))
        return tuple(found.values())

    torch.autograd.gradcheck(outputs, [inputs[n].requires_grad_() for n in names], fast_mode=True)


def scan_once_a_kernel() -> None:
    """Makes Triton's interpreter scan triton.language once per kernel.

    It scans at each call of a device function, which takes a third of the time here and finds only
    what it replaced before.
    """
    scan = interpreter._patch_builtin
    first: dict[int, str | None] = {}

    def patch(pkg: Any, *rest: Any) -> None:
        if id(pkg) not in first:
            first[id(pkg)] = next((n for n in dir(pkg) if is_builtin(getattr(pkg, n))), None)
        name = first[id(pkg)]
        if name is not None and is_builtin(getattr(pkg, name)):
            scan(pkg, *rest)

    interpreter._patch_builtin = patch


def count_by_arrays_of_one() -> None:
    """Allows one-element arrays as ints: Triton 3.6 needs it, and NumPy no longer does it."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if __name__ == "__main__":
    scan_once_a_kernel()
    count_by_arrays_of_one()
    checks = {
        "lift_head": check_feature_distance,
        "widelast_projection": check_two_layer_norms,
        "soft_kd": check_soft_kd,
    }
    for op, work in checks.items():
        with featkd.use_backend("triton"):
            work()
        assert featkd.last_backend(op) == "triton"
        print(op)
