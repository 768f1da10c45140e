"""lift_head's kernels in float64: problems, slips to plant, gradcheck."""

from __future__ import annotations

from types import ModuleType

import torch

from featkd.kernels.configs import Config
from featkd.ops.support import distance_factor
from tests.kernels.feature_kd_cases import relative
from tests.kernels.lift_head_cases import Problem, evaluate

# an odd grid; no teacher; and two images whose tokens do not fill their two tiles, channels that do
# not fill their blocks, and groups of those
EPS = 0.1  # so large that dropping it is seen
PROBLEMS = [
    Problem(1, 9, 16, 20, 3),
    Problem(2, 9, 20, 16, 0, compare=False),
    Problem(2, 20, 20, 24, 4),
]
# (name, what stands in the kernels, what a slip would have put there)
MUTANTS = [
    ("zeroed gradient", "sums[k] * size,", "sums[k] * 0,"),
    ("gradient of the wrong sign", "rstd[:, None] * (g", "-rstd[:, None] * (g"),
    (
        "dropped gradient of the pooled map",
        "shift = _scaled(d_loss, None if d_pooled is None else d_pooled / tokens, compute)",
        "shift = _scaled(d_loss, 0 * d_pooled, compute)",
    ),
    ("W not centred", "return exact - exact.mean(0)", "return exact"),
    ("pooled gradient of another image", "(shift + image * CT", "(shift + (image + 1) % 2 * CT"),
    ("pooled gradient not divided by the tokens", "d_pooled / tokens", "d_pooled / 2"),
    ("dropped mean of the pooled gradient", "mean_g += tl.load(shift_mean + image)", ""),
    ("dropped mean(g x_hat) of the pooled gradient", "mean_gx += rstd * along", ""),
    ("dropped mean(g)", "(g - mean_g[:, None] - ", "(g - "),
    ("dropped mean(g x_hat)", " - normed * mean_gx[:, None])", ")"),
    ("missing scale of the loss", "total = scale * half", "total = half"),
    ("missing scale of the loss's mean(g)", "mean_g *= scale", ""),
    (
        "images mixed in the pooled sum",
        "pooled.sum(1)",
        "pooled.view(tiles, batch, channels).sum(0)",
    ),
    ("pooled sum without rstd", "f.to(ACC) * rstd[:, None], 0", "f.to(ACC), 0"),
    ("skipped last tile of the pooled sum", "pooled.sum(1)", "pooled[:, :-1].sum(1)"),
    ("skipped last tile", "triton.cdiv(image_rows, tile)", "max(1, image_rows // tile)"),
    ("skipped last channel block", "j in range(tl.cdiv(CT", "j in range(-1 + tl.cdiv(CT"),
    ("skipped last split", "first + tiles_a_split, all", "first + tiles_a_split - split, all"),
    ("groups of dW in each other's place", "sums[k], first + k, CS", "sums[k], k, CS"),
    ("groups of df in each other's place", "size, group * GROUP + k", "size, k"),
    ("skipped last partial sum", "in range(splits)", "in range(splits - 1)"),
    ("dropped epsilon", "squares / CT + eps", "squares / CT"),
    ("dropped spectral term", "rows + plain + sign * alternating", "rows + plain"),
    ("dropped row sums", "rows + plain + sign * alternating", "rows + sign * alternating"),
    ("wrong stride of the weight", "out[:, None] * stride", "out[:, None] * (stride - 1)"),
    ("wrong stride of the teacher", "image * teacher_image", "image * features_image"),
    ("gradient of gamma without dz", "sum_gamma += tl.sum(dz * x, 0)", "sum_gamma += tl.sum(x, 0)"),
]  # fmt: skip


def errors(kernels: ModuleType, problem: Problem) -> dict[str, float]:
    """Relative errors in float64 of the outputs and every gradient, by the kernels of a module."""
    small = Config(16, 16, 16, 16, num_warps=1)
    kernels.distance_config = kernels.features_config = kernels.head_config = lambda *_: small
    kernels.split_count = lambda rows: 2
    x = problem.inputs(torch.float64)
    head = kernels.Head(x.weight, x.norm_weight, x.norm_bias)
    arguments = {"width": problem.width, "compute": torch.float64}
    pooled, total, statistics = kernels.forward(
        x.features, head, x.teacher, eps=EPS, need_statistics=True, **arguments
    )
    got = {"pooled": x.norm_bias + x.norm_weight * pooled}
    d_loss = None
    if x.teacher is not None:
        factor = distance_factor(x.teacher, problem.width)
        got["loss"] = total * factor
        d_loss = torch.tensor(2 * factor * x.upstream, dtype=torch.float64)
    got["features"], gradients = kernels.backward(
        *(x.features, head, x.teacher, statistics, d_loss, x.direction),
        need_features=True,
        need_parameters=True,
        **arguments,
    )
    got |= dict(zip(("weight", "norm_weight", "norm_bias"), gradients, strict=True))
    want = evaluate(x, problem.width, EPS)
    assert set(got) == set(want)
    return {name: relative(got[name].nan_to_num(1e9), value) for name, value in want.items()}


def worst(kernels: ModuleType) -> float:
    """The largest error over all problems, or over the first that shows a slip."""
    largest = 0.0
    for problem in PROBLEMS:
        largest = max(largest, *errors(kernels, problem).values())
        if largest > 1e-3:
            break
    return largest


def gradcheck() -> None:
    """torch's numerical gradients through the public function, of both outputs and of each."""
    import featkd
    from featkd.functional import lift_head

    def check(width: int, compare: bool, picked: slice) -> None:
        x = Problem(2, 6, 3, 5, width, compare).inputs(torch.float64)
        leaves = [p.requires_grad_() for p in x[:4]]
        metric, grid = ("spectral", (6 // width, width)) if width else ("mse", None)

        def outputs(*leaves):
            return lift_head(*leaves, x.teacher, metric=metric, grid=grid)[picked]

        torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
        assert featkd.last_backend("lift_head") == "triton"

    with featkd.use_backend("triton"):
        check(2, True, slice(2))
        check(0, True, slice(1, 2))
        check(0, True, slice(1))
        check(0, False, slice(1))
