"""talking_heads_attention's kernel in float64: problems, slips to plant; it has no gradient."""

from __future__ import annotations

from types import ModuleType

import torch

import featkd
from featkd.functional import talking_heads_attention
from tests.kernels.feature_kd_cases import relative
from tests.kernels.talking_heads_cases import Problem, exact

# rows, keys and channels that do not fill their blocks; two groups of channels
PROBLEMS = [Problem(2, 3, 11, 8)]
# (name, what stands in the kernel, what a slip would have put there)
MUTANTS = [
    ("dropped scale", "(pre_weight.to(acc) * scale)", "pre_weight.to(acc)"),
    ("pre-mix transposed", "pre + g * HEADS, 1, j", "pre + g, HEADS, j"),
    ("post-mix transposed", "post + g, HEADS, block + j", "post + g * HEADS, 1, block + j"),
    ("dropped bias", "result + (tl.zeros((ROWS, BLOCK), ACC) + of_all,)",
     "result + (tl.zeros((ROWS, BLOCK), ACC) + 0 * of_all,)"),
    ("bias of the next head", "_of_channels(post_bias, 1", "_of_channels(post_bias + 1, 0"),
    ("one head's bias for all", "(channel // DIM) * stride", "channel * 0"),
    ("keys past the end", "scores, float(\"-inf\"))", "scores, 0.0)"),
    ("skipped last keys", "for first in range(0, tokens, KEYS):\n            at",
     "for first in range(0, tokens - KEYS, KEYS):\n            at"),
    ("sums not rescaled", "total = total * shrunk + ", "total = total + "),
    ("parts not rescaled", "parts[j] * shrunk[:, None]", "parts[j]"),
    ("not normalised", "parts[j] / total[:, None]", "parts[j]"),
    ("no maximum taken off", "p = tl.exp(scores - higher", "p = tl.exp(scores - 0 * higher"),
    ("skipped last head", "for g in range(HEADS):", "for g in range(HEADS - 1):"),
    ("heads overwritten", "(sums[j] + parts[j]", "(parts[j]"),
    ("wrong image of the values", "value += image * value_image", "value += 0 * value_image"),
    ("wrong image of the keys", "key += image * key_image", "key += 0 * key_image"),
    ("wrong stride of the queries", "token * query_token", "token * key_token"),
    ("first group twice", "tl.program_id(2) * GROUP", "tl.program_id(2) * 0"),
    ("skipped last row", "valid = row < tokens\n", "valid = row < tokens - 1\n"),
]  # fmt: skip


def worst(kernels: ModuleType) -> float:
    """The largest error, or the first that shows a slip; what is not written is NaN."""
    torch.use_deterministic_algorithms(True)  # fills empty tensors
    assert torch.empty(1).isnan()
    kernels.config = lambda *_: kernels.Config(8, 8, 16, group=16, num_warps=1, num_stages=1)
    largest = 0.0
    for problem in PROBLEMS:
        x = problem.tensors(torch.float64)
        x["q"] = 3 * x["q"].contiguous() + 0.5  # other strides than the keys'
        names = ("q", "k", "v", "pre_weight", "post_weight", "post_bias")
        given = [x[name] for name in names]
        got = kernels.forward(*given, scale=problem.scale, compute=torch.float64)
        error = relative(got.nan_to_num(1e9), exact(x, problem.scale))
        largest = max(largest, error)
        if largest > 1e-3:
            break
    return largest


def gradcheck() -> None:
    """There is no gradient: the kernel through the public function."""
    problem = PROBLEMS[0]
    x = problem.tensors(torch.float64)
    with featkd.use_backend("triton"):
        got = talking_heads_attention(**x, scale=problem.scale)
    assert featkd.last_backend("talking_heads_attention") == "triton"
    assert relative(got, exact(x, problem.scale)) < 1e-13
