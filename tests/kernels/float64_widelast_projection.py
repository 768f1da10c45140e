"""widelast_projection's kernels in float64: problems, slips to plant, gradcheck."""

from __future__ import annotations

from types import ModuleType

import torch

from featkd.kernels.configs import Config
from tests.kernels.feature_kd_cases import relative
from tests.kernels.widelast_cases import EPS, NAMES, Problem, evaluate

# two tiles of 16 rows, two channel blocks of 16, two groups of x's channel blocks; once with h and
# x held and once not
PROBLEMS = [(Problem(2, 9, 20, 24), False), (Problem(2, 9, 20, 24), True)]
SMALL = {hold: Config(16, 16, 16, 16, hold, num_warps=1) for hold in (False, True)}
# (name, what stands in the kernels, what a slip would have put there)
MUTANTS = [
    ("zeroed gradient", "valid, sums[k], k, CS, CS_BLOCK", "valid, sums[k] * 0, k, CS, CS_BLOCK"),
    ("dropped du", "total = rstd_r[:, None] * g", "total = 0 * g"),
    ("dropped dr", "total += rows.load_rows(d_residual", "total += 0 * rows.load_rows(d_residual"),
    ("dropped mean(g r_hat)", " - r_hat * mean_2[:, None]\n", "\n"),
    ("dropped mean(q)", "gamma * dr - mean_3[:, None]", "gamma * dr"),
    ("dropped mean(q h_hat)", " - h_hat * mean_4[:, None])", ")"),
    ("mean(q) without LN_1's mean", "sum_q - mean_1 * sum_gamma", "sum_q"),
    ("mean(q h_hat) without LN_1's slope", " - mean_2 * sum_rh)", ")"),
    ("dropped gamma_p", "rstd_h[:, None] * (gamma * dr", "rstd_h[:, None] * (dr"),
    (
        "dropped epsilon of LN_p",
        "rstd_h = 1.0 / tl.sqrt(squares / CT + eps)",
        "rstd_h = 1.0 / tl.sqrt(squares / CT)",
    ),
    (
        "dropped epsilon of LN_1",
        "rstd_r = 1.0 / tl.sqrt(squares / CT + eps)",
        "rstd_r = 1.0 / tl.sqrt(squares / CT)",
    ),
    (
        "variance about zero",
        "centred = rows.inside(blocks[j] - mean[:, None]",
        "centred = rows.inside(blocks[j] + 0 * mean[:, None]",
    ),
    ("no squares between blocks", "+ shift * shift * (count * (1 - share))", ""),
    (
        "padding counted",
        "mask = mask & (channel < CHANNELS)[None, :]\n    return tl.where",
        "return tl.where",
    ),
    (
        "skipped last tile",
        "(triton.cdiv(batch * tokens, config.rows),)",
        "(triton.cdiv(batch * tokens, config.rows) - 1,)",
    ),
    ("skipped last channel block", "for j in range(BLOCKS):", "for j in range(BLOCKS - 1):"),
    (
        "skipped last block of x",
        "for k in range(tl.cdiv(CS, CS_BLOCK)):",
        "for k in range(tl.cdiv(CS, CS_BLOCK) - 1):",
    ),
    ("skipped last partial sum", "in range(splits)", "in range(splits - 1)"),
    ("skipped last split", "(split + 1) * tiles)", "(split + 1) * tiles - split)"),
    ("first group twice", "group = tl.program_id(0) // BLOCKS", "group = 0 * tl.program_id(0)"),
    (
        "wrong stride of du",
        "image * du_image + token * du_token",
        "image * du_image + token * x_token",
    ),
    ("wrong stride of the weight", "valid, weight, CS, None", "valid, weight, CS - 1, None"),
    (
        "swapped statistics",
        "tl.join(tl.join(a, c), tl.join(b, d))",
        "tl.join(tl.join(a, d), tl.join(b, c))",
    ),
    ("swapped norms", '"beta_1": parameters.beta_1', '"beta_1": parameters.beta_p'),
]


def use(kernels: ModuleType, config: Config) -> None:
    """Give all launches of a module's kernels one configuration."""
    kernels.forward_config = kernels.input_config = kernels.parameter_config = lambda *_: config


def errors(kernels: ModuleType, problem: Problem, hold: bool) -> dict[str, float]:
    """Relative errors in float64 of both outputs and every gradient, by a module's kernels."""
    use(kernels, SMALL[hold])
    kernels.split_count = lambda rows: 2
    *inputs, d_residual, d_normed = tensors = problem.tensors(torch.float64)
    x, parameters = inputs[0], kernels.Parameters(*inputs[1:])
    compute = torch.float64
    r, u, statistics = kernels.forward(
        x, parameters, eps=EPS, compute=compute, residual_dtype=compute, need_gradient=True
    )
    d_input, gradients = kernels.backward(
        *(x, parameters, d_residual, d_normed, statistics),
        compute=compute,
        need_input=True,
        need_parameters=True,
    )
    got = dict(zip(NAMES, (r, u, d_input, *gradients), strict=True))
    want = evaluate(tensors, problem.used, torch.float64)
    return {name: relative(got[name].nan_to_num(1e9), x) for name, x in want.items()}


def worst(kernels: ModuleType) -> float:
    """The largest error over all problems; the rest are left out once one is far off."""
    found = 0.0
    for problem in PROBLEMS:
        if found < 1e-3:
            found = max(found, *errors(kernels, *problem).values())
    return found


def gradcheck() -> None:
    """torch's numerical gradients through the public function."""
    import featkd
    from featkd.functional import widelast_projection
    from featkd.kernels import widelast_projection as kernels

    use(kernels, SMALL[True])
    leaves = [x.requires_grad_() for x in Problem(1, 2, 2, 3).tensors(torch.float64)[:6]]
    with featkd.use_backend("triton"):
        for chosen in (slice(0, 2), slice(0, 1), slice(1, 2)):  # r and u, r, u

            def outputs(*inputs, chosen=chosen):
                return widelast_projection(*inputs, eps=EPS)[chosen]

            torch.autograd.gradcheck(outputs, leaves, fast_mode=chosen != slice(0, 2))
        x, *parameters = leaves
        fixed = [p.detach() for p in parameters]
        torch.autograd.gradcheck(lambda x: outputs(x, *fixed), x, fast_mode=True)
        torch.autograd.gradcheck(lambda *p: outputs(x.detach(), *p), parameters, fast_mode=True)
    assert featkd.last_backend("widelast_projection") == "triton"
