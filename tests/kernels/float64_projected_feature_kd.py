"""projected_feature_kd's kernels in float64: problems, slips to plant, gradcheck."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from featkd.ops.support import distance_factor
from tests.kernels.feature_kd_cases import Problem, evaluate, relative

EPS = 0.1  # so large that dropping it is seen
PROBLEMS = [
    Problem(2, 15, 24, 40, 5, bias=True),
    Problem(3, 8, 20, 24, 4),
    Problem(3, 9, 16, 33, 0, norm="none", bias=True),
    Problem(5, 12, 36, 36, 4, projector=False, norm="none"),
]
# (name, what stands in the kernels, what a slip would have put there)
MUTANTS = [
    ("zeroed gradient", "valid, sums[k], group * GROUP", "valid, sums[k] * 0, group * GROUP"),
    (
        "zeroed dW",
        "total = tl.dot(operand, block, sums[k]",
        "total = tl.dot(0 * operand, block, sums[k]",
    ),
    (
        "gradient of the wrong sign",
        "rstd[:, None] * (g",
        "-rstd[:, None] * (g",
    ),
    ("dropped mean(g)", "(g - mean_g[:, None] - ", "(g - "),
    ("dropped mean(g x_hat)", " - normed * mean_gx[:, None])", ")"),
    (
        "dropped gamma",
        "g = half * rows.load_channels(gamma, j, CT, CT_BLOCK, ACC)[None, :]",
        "g = half",
    ),
    (
        "dropped epsilon",
        "squares / CT + eps",
        "squares / CT",
    ),
    (
        "dropped spectral term",
        "total = rows + plain + sign * alternating",
        "total = rows + plain",
    ),
    (
        "dropped row sums",
        "total = rows + plain + sign * alternating",
        "total = rows + sign * alternating",
    ),
    (
        "alternating sum at odd widths",
        "tl.where(width % 2 == 0, alternating, 0.0)",
        "alternating",
    ),
    (
        "skipped last tile",
        "programs = triton.cdiv(",
        "programs = -1 + triton.cdiv(",
    ),
    (
        "skipped last channel block",
        "for j in range(BLOCKS):",
        "for j in range(BLOCKS - 1):",
    ),
    (
        "skipped last split",
        "(split + 1) * tiles)",
        "(split + 1) * tiles - split)",
    ),
    ("wrong stride of the weight", "out[:, None] * stride", "out[:, None] * (stride - 1)"),
    ("skipped last group of dW's channels", "first = tl.program_id(2) * GROUP", "first = 0"),
    ("skipped last group of dS's channels", "0 if GROUPS == 1 else tl.program_id(1)", "0"),
    (
        "wrong stride of the teacher",
        "image * teacher_image",
        "image * student_image",
    ),
    (
        "swapped statistics",
        "tl.join(tl.join(a, c), tl.join(b, d))",
        "tl.join(tl.join(a, d), tl.join(b, c))",
    ),
    ("missing factor of the loss and upstream", "total * tl.load(factor)", "total"),
    ("missing factor of dS", ".to(factor.dtype.element_ty) * tl.load(factor)", ""),
    ("skipped last partial sum", "in range(splits)", "in range(splits - 1)"),
    ("dropped bias", "total += load_channels(bias", "total += 0 * load_channels(bias"),
]


def errors(kernels: ModuleType, problem: Problem) -> dict[str, float]:
    """Relative errors in float64 of the loss and every gradient, by the kernels of a module."""
    hold = problem.batch == 2
    small = kernels.Config(16, 16, 32, 16, hold, num_warps=1, num_stages=1)
    kernels.loss_config = kernels.gradient_config = lambda *_: small
    kernels.split_count = lambda *_: 2
    tensors = problem.tensors(torch.float64)
    student, teacher, *parameters = tensors
    names = ("weight", "bias", "norm_weight", "norm_bias")
    arguments = {"width": problem.width, "compute": torch.float64}
    bundle = kernels.Parameters(*parameters)
    total, d_student, statistics = kernels.forward(
        student, teacher, bundle, eps=EPS, need_student=True, need_parameters=True, **arguments
    )
    factor = distance_factor(teacher, problem.width)
    scale = torch.tensor(2 * factor, dtype=torch.float64)
    scaled = importlib.import_module(f"{kernels.__package__}.scaled")
    got = {"loss": total * factor, "student": scaled.times(d_student, scale)}
    gradients = kernels.backward(student, teacher, bundle, statistics, scale, **arguments)
    got |= {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    want = evaluate(tensors, problem.width, torch.float64, EPS)
    assert set(got) == set(want)
    return {name: relative(got[name].nan_to_num(1e9), x) for name, x in want.items()}


def worst(kernels: ModuleType) -> float:
    """The largest error over all problems, or over the first that shows a slip."""
    largest = 0.0
    for problem in PROBLEMS:
        largest = max(largest, *errors(kernels, problem).values())
        if largest > 1e-3:
            break
    return largest


def gradcheck() -> None:
    """torch's numerical gradients through the public function."""
    import featkd
    from featkd.functional import projected_feature_kd

    for width in (0, 2, 3):
        tensors = Problem(1, 6, 3, 5, width, bias=True).tensors(torch.float64)
        leaves = [x.requires_grad_() for i, x in enumerate(tensors) if i != 1]
        metric, grid = ("spectral", (6 // width, width)) if width else ("mse", None)

        def loss(student, *parameters, teacher=tensors[1], metric=metric, grid=grid):
            return projected_feature_kd(student, teacher, *parameters, metric=metric, grid=grid)

        with featkd.use_backend("triton"):
            torch.autograd.gradcheck(loss, leaves, fast_mode=width != 3)
        assert featkd.last_backend("projected_feature_kd") == "triton"
