"""Slips to plant in copies of featkd/cpu and featkd/ops, and what to run on such a copy.

SUITES has, for each op, `worst`, the largest relative error in float64 of outputs and gradients
over a few problems by the public function, and the slips: (name, what stands in the source, what a
slip would have put there). Chunks hold 12 rows, and blocks of scores 600 bytes, so that small
problems have several. Half types,
for which some lines stand alone, are left to the ops' own tests.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import featkd
from featkd import functional
from featkd.factors import restore
from tests.kernels import (
    feature_kd_cases,
    lift_head_cases,
    soft_kd_cases,
    talking_heads_cases,
    widelast_cases,
)
from tests.kernels.feature_kd_cases import relative
from tests.ops import (
    test_projected_feature_kd,
    test_soft_kd,
    test_teacher_in_factors,
    test_widelast_projection,
)

UPSTREAM = -3.0
SOURCES = [
    path
    for folder in ("cpu", "ops")
    for path in sorted((Path(featkd.__file__).parent / folder).glob("*.py"))
]


def plant(folder: Path, name: str, there: str, slip: str, sweeps: str = "featkd") -> None:
    """Write a package with cpu/ and ops/, and the slip where `there` stands, once in all.

    `sweeps` is the namespace of the operators of csrc that it calls.
    """
    texts = {path: path.read_text() for path in SOURCES}
    found = sum(text.count(there) for text in texts.values()) if there else 1
    assert found == 1, f"stands {found} times in the sources: {there}"
    for path, text in texts.items():
        text = text.replace(there, slip) if there else text
        for kind in ("cpu", "ops"):
            text = text.replace(f"featkd.{kind}", f"{name}.{kind}")
        target = folder / name / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = text.replace('"featkd::', f'"{name}::')
        target.write_text(text.replace("torch.ops.featkd.", f"torch.ops.{sweeps}."))


def errors(op: str, name: str, patch: pytest.MonkeyPatch) -> Iterator[float]:
    """The relative errors of the op in a planted package, problem by problem."""
    small = {"ROWS": 12, "_ROWS": 12, "_BLOCK_BYTES": 600}
    importlib.import_module(f"{name}.cpu.{op}")
    for module in [m for key, m in sys.modules.items() if key.startswith(f"{name}.cpu.")]:
        for constant in small.keys() & vars(module).keys():
            setattr(module, constant, small[constant])
    patch.setattr(functional, f"{op}_op", importlib.import_module(f"{name}.ops.{op}"))
    patch.setattr(featkd.backends, "_last", {})
    for got, want in SUITES[op].results():
        assert featkd.last_backend(op) == "cpu"
        assert set(got) == set(want)
        for key, value in want.items():
            yield relative(got[key].nan_to_num(1e9), value)


Results = Iterator[tuple[dict[str, Any], dict[str, Any]]]


class Suite(NamedTuple):
    """What is run, yielding outputs and gradients beside the exact ones; and the slips."""

    results: Callable[[], Results]
    slips: list[tuple[str, str, str]]


def unscaled(got: dict[str, Any]) -> dict[str, Any]:
    return {key: x if key == "loss" else x / UPSTREAM for key, x in got.items()}


def projected_feature_kd() -> Results:
    of = feature_kd_cases.Problem
    for problem in (
        of(5, 6, 3, 5, 2, bias=True),
        of(2, 20, 3, 5, 5, norm="weight"),  # more tokens than a chunk has rows
        of(5, 6, 3, 5),
        of(5, 6, 4, 4, projector=False, norm="none"),
        of(5, 6, 4, 4, 3, projector=False, norm="none"),
    ):
        tensors = problem.tensors(torch.float64)
        got = test_projected_feature_kd.run(tensors, problem.width, UPSTREAM)
        yield unscaled(got), feature_kd_cases.evaluate(tensors, problem.width, torch.float64)
    for problem in (of(5, 6, 3, 5, 2), of(5, 6, 4, 4, projector=False, norm="none")):
        tensors = problem.tensors(torch.float64)
        teacher = test_teacher_in_factors.factors(problem, torch.float64, rank=2)
        tensors[1] = restore(teacher)
        got = test_teacher_in_factors.run(tensors, teacher, problem.width, UPSTREAM)
        yield unscaled(got), feature_kd_cases.evaluate(tensors, problem.width, torch.float64)


def lift_head() -> Results:
    of = lift_head_cases.Problem
    for problem in (
        of(5, 6, 3, 5, 2),
        of(2, 20, 3, 5, 5),
        of(5, 6, 4, 6, compare=False),
        of(2, 20, 4, 6, compare=False),
    ):
        x = problem.inputs(torch.float64)
        yield lift_head_cases.run(x, problem.width), lift_head_cases.evaluate(x, problem.width)
    x = of(5, 6, 3, 5, 2).inputs(torch.float64)
    same = feature_kd_cases.Problem(5, 6, 3, 5)
    teacher = test_teacher_in_factors.factors(same, torch.float64, rank=2)
    whole = x._replace(teacher=restore(teacher))
    yield (
        lift_head_cases.run(x._replace(teacher=teacher), 2),
        lift_head_cases.evaluate(whole, 2),
    )
    x = of(5, 6, 3, 5).inputs(torch.float64)  # the loss alone
    leaves = [p.requires_grad_() for p in x[:4]]
    loss = functional.lift_head(*leaves, x.teacher)[1]
    gradients = torch.autograd.grad(UPSTREAM * loss, leaves)
    names = ("loss", "student", "weight", "norm_weight", "norm_bias")
    tensors = [x.features, x.teacher, x.weight, None, x.norm_weight, x.norm_bias]
    want = feature_kd_cases.evaluate(tensors, 0, torch.float64)
    yield unscaled(dict(zip(names, (loss.detach(), *gradients), strict=True))), want


def soft_kd() -> Results:
    of = soft_kd_cases.Problem
    for problem in (
        of(5, 7),
        of(5, 7, 0.6, soft=True),
        of(5, 7, 0.6, tau=2.0, soft=True),
        of(5, 7, 0.6, tau=2.0),
        of(5, 7, alpha=0.0),
        of(5, 7, alpha=1.0, tau=2.0),
    ):
        tensors = problem.tensors(torch.float64)
        got = test_soft_kd.run(*tensors, problem, UPSTREAM)
        yield unscaled(got), soft_kd_cases.evaluate(*tensors, problem.alpha, problem.tau)


def widelast_projection() -> Results:
    of = widelast_cases.Problem
    for problem in (of(5, 6, 3, 5), of(2, 20, 3, 5), of(5, 6, 3, 5, "normed")):
        tensors = problem.tensors(torch.float64)
        want = widelast_cases.evaluate(tensors, problem.used, torch.float64)
        yield test_widelast_projection.run(tensors, problem.used), want


def talking_heads_attention() -> Results:
    of = talking_heads_cases.Problem
    for problem, scale in (
        (of(5, 2, 4, 3), 0.5),  # blocks of images
        (of(2, 3, 9, 4), 0.5),  # and of queries
        (of(1, 5, 3, 2), 900.0),
        (of(2, 4, 1, 2), 1.0),
    ):
        tensors = problem.tensors(torch.float64)
        got = functional.talking_heads_attention(**tensors, scale=scale)
        yield {"out": got}, {"out": talking_heads_cases.exact(tensors, scale)}


CHUNKS = [
    ("skipped last images", "range(0, batch, images)]", "range(0, batch - images, images)]"),
    ("skipped last tokens", "range(0, tokens, step)", "range(0, tokens - step, step)"),
    ("images of the next chunk", "slice(i, i + images)", "slice(i, i + images + 1)"),
]
DISTANCE = [
    ("wrong scale of the mse", "1 / (batch * tokens * channels)", "1 / (tokens * channels)"),
    ("wrong scale of the spectrum", "(width // 2 + 1)", "(width // 2)"),
    ("scale of the left factor", "channels = right.shape[1]", "pass"),
    ("right factors of the first images", "self.right[at[0]]", "self.right[:images]"),
    ("dropped factors", "right.mT, out=place)", "0 * right.mT, out=place)"),
    (
        "map of the chunk before",
        "return torch.bmm(chunk",
        "return place if place.any() else torch.bmm(chunk",
    ),
]

SUITES = {
    "projected_feature_kd": Suite(
        projected_feature_kd,
        [
            *CHUNKS,
            *DISTANCE,
            (
                "dropped dS of a restored chunk",
                "slope = d_student[images, tokens] if",
                "slope = d_student.zero_()[images, tokens] if",
            ),
            (
                "loss's scale of the left factor",
                "    factor = support.distance_factor(teacher, width, right)",
                "    factor = support.distance_factor(teacher, width)",
            ),
            (
                "gradients' scale of the left factor",
                "grad * (2 * support.distance_factor(teacher, width, right))",
                "grad * (2 * support.distance_factor(teacher, width))",
            ),
            (
                "zeroed gradient of the student",
                "put_product(p, factor, ",
                "torch.Tensor.zero_(",
            ),
            ("zeroed gradient of W", "add_product(sums[0].view(factor.shape), p.t(), s)", "pass"),
            (
                "gradients of bias and norm in each other's place",
                "for p in (w, *vectors)]\n    d_s",
                "for p in (w, *vectors)]\n    sums[1:] = sums[:0:-1]\n    d_s",
            ),
            ("missing scale of the loss", "total * factor, d_student, d_", "total, d_student, d_"),
            (
                "missing upstream gradient",
                "factor = grad * (2 * support",
                "factor = torch.ones_like(grad) * (2 * support",
            ),
            ("gradient of half the loss", "grad * (2 * support", "grad * (1 * support"),
            ("missing scale of dS", "[d_student * factor]", "[d_student * 1]"),
            ("missing scale of dW", "total.view(p.shape) * factor", "total.view(p.shape) * 1"),
            (
                "missing scale of a difference",
                "0.0, width, factor, *rest)",
                "0.0, width, None, *rest)",
            ),
        ],
    ),
    "lift_head": Suite(
        lift_head,
        [
            *CHUNKS[:2],
            *DISTANCE[2:],
            (
                "loss's scale of the left factor",
                "energy * support.distance_factor(teacher, width, right)",
                "energy * support.distance_factor(teacher, width)",
            ),
            (
                "gradients' scale of the left factor",
                "d_loss * (2 * support.distance_factor(teacher, width, right))",
                "d_loss * (2 * support.distance_factor(teacher, width))",
            ),
            ("W not centred", "- exact.mean(0)\n    used", "\n    used"),
            ("W not centred in the gradient", "- exact.mean(0)\n    g =", "\n    g ="),
            ("skipped chunks of the pooled map", "means[at[0]] += torch", "means[at[0]] = torch"),
            ("pooled sum without rstd", "torch.bmm(scales.uns", "torch.bmm((0 * scales + 1).uns"),
            ("a sum for the mean", "means /= tokens", "pass"),
            ("other tokens' product", "p = product[at] if", "p = product[at].flip(1) if"),
            (
                "zeroed gradient of f",
                "put_product(slope, factor, ",
                "torch.Tensor.zero_(",
            ),
            ("zeroed gradient of W", "add_product(d_weight, slope.t(), f)", "pass"),
            ("metric of the mse", "width = 0 if d_loss is None else width", "width = 0"),
            ("pooled gradient of another image", "else added[at[0]]", "else added.flip(0)[at[0]]"),
            ("pooled gradient dropped beside the loss", "else added[at[0]]", "else None"),
            ("pooled gradient not divided beside the loss", "d_pooled / tokens\n", "d_pooled\n"),
            ("dropped gamma", "norm_weight.to(dtype), pooled)", "1 + 0 * norm_weight, pooled)"),
            ("dropped gamma in the gradient", "(gamma.detach().to(dtype) / tokens)", "1 / tokens"),
            ("pooled gradient not divided", ".to(dtype) / tokens)", ".to(dtype) / 1)"),
            ("dropped mean(g)", "g -= g.mean(1, keepdim=True)", "pass"),
            ("dropped mean(g x_hat) in df", ".mul_(-weights)", ".mul_(0 * weights)"),
            ("dropped mean(g x_hat) in dW", "(centred, outer, alpha=-1)", "(centred, outer * 0)"),
            ("wrong power of rstd", "r.pow(3)", "r.pow(2)"),
            ("mean(g x_hat) not divided", ".mul_(r.pow(3)).div_(len(weight))", ".mul_(r.pow(3))"),
            ("dropped pooled gradient", "df.addcmul_(r, v[images].unsqueeze(1))", "pass"),
            ("missing upstream gradient", "else d_loss.to(dtype)", "else torch.ones_like(d_loss)"),
            (
                "dropped gradient of the loss",
                "target = None if scale is None",
                "target = None if 1",
            ),
            ("missing scale of the loss", "energy * support.dist", "energy + 0 * support.dist"),
            ("gradient of half the loss", "d_loss * (2 * support", "d_loss * (1 * support"),
            ("zeroed gradient of gamma", "(d_pooled * (means @", "(0 * d_pooled * (means @"),
        ],
    ),
    "soft_kd": Suite(
        soft_kd,
        [
            ("zeroed gradient", "return gradient * (grad / ", "return gradient * (0 * grad / "),
            ("missing upstream gradient", "(grad / gradient.shape[0])", "(1 / len(gradient))"),
            ("missing mean", "(grad / gradient.shape[0])", "grad"),
            (
                "a sum of the losses",
                "return losses.mean(), gradient",
                "return losses.sum(), gradient",
            ),
        ],
    ),
    "widelast_projection": Suite(
        widelast_projection,
        [
            *CHUNKS[:2],
            (
                "zeroed gradient of x",
                "put_product(d_product, factor, ",
                "torch.Tensor.zero_(",
            ),
            ("zeroed gradient of W", "add_product(d_weight, d_product.t(), s)", "pass"),
            (
                "zeroed gradients of the norms",
                "[d_weight, *(x.clone()",
                "[d_weight, *(torch.zeros_like(x)",
            ),
            (
                "norms in each other's place",
                "torch.stack(norms)",
                "torch.stack(norms[2:] + norms[:2])",
            ),
            (
                "dropped gradient of r",
                "dr, du = (None if d is",
                "dr, du = (None if d is d_residual or d is",
            ),
            (
                "statistics of the first chunk",
                "here = slice(done, done + len(s))",
                "here = slice(0, len(s))",
            ),
            (
                "outputs in each other's place",
                "return residual, normed, statistics, h",
                "return normed, residual, statistics, h",
            ),
        ],
    ),
    "talking_heads_attention": Suite(
        talking_heads_attention,
        [
            ("dropped scale", "(pre_weight.to(dtype) * scale)", "pre_weight.to(dtype)"),
            ("skipped last block", "first in range(0, batch, ", "first in range(0, batch - 2, "),
            ("skipped last queries", "range(0, tokens, queries)", "range(0, tokens - 1, queries)"),
            ("mixes in each other's place", "pre, post, bias)\n", "post, pre, bias)\n"),
            ("dropped bias", "post_bias.to(dtype).cont", "post_bias.to(dtype).mul(0).cont"),
            (
                "the first block's queries",
                "images, start : start + queries] = mixed",
                "images, : rows.shape[1]] = mixed",
            ),
        ],
    ),
}
