"""csrc's sweeps over rows: their schemas, as featkd/cpu calls them.

Each takes views of any strides and of any floating dtype where it only reads maps or logits, and
contiguous tensors where it writes; "numbers" are contiguous in the accumulators' dtype. The rows
are dealt to torch's threads in at most 32 blocks, whose sums are added up in order: results do not
depend on the number of threads. What is None is not there, or not formed. Scratch memory is a few
rows a thread. The operators know no gradients and no fake tensors: custom ops call them.
"""

from __future__ import annotations

import torch

from featkd import extension

extension.missing()  # loads it: a custom op may be called without a choice of backend before

# E = LN(source + bias) - teacher; H = E, or E with its sums over `width` tokens. Adds sum(E H) to
# `total` (float64), writes 1 / std of the rows, and the gradient of scale * sum(E H) / 2
# + sum(LN(source + bias) * added) with respect to the source as `slope`, which may be the source;
# adds its gradients with respect to bias, gamma and beta. `added` is (B, C).
torch.library.define(
    "featkd::distance_rows",
    "(Tensor source, Tensor? teacher, Tensor? bias, Tensor? gamma, Tensor? beta, float eps, "
    "int width, Tensor? scale, Tensor? added, Tensor(a!)? slope, Tensor(b!)? rstd, "
    "Tensor(c!)? total, Tensor(d!)? d_bias, Tensor(e!)? d_gamma, Tensor(f!)? d_beta) -> ()",
)
distance = torch.ops.featkd.distance_rows.default

# Writes the rows' losses (numbers) and the gradient of their sum; target is (B,) int64 or (B, K).
torch.library.define(
    "featkd::soft_kd_rows",
    "(Tensor student, Tensor? teacher, Tensor? target, float alpha, float tau, "
    "Tensor(a!) losses, Tensor(b!)? slope) -> ()",
)
soft_kd = torch.ops.featkd.soft_kd_rows.default

# r = LN_p(h), u = LN_1(r) of h (rows, C); parameters are (4, C) numbers: gamma and beta of each.
# Writes residual, normed, and the mean and 1 / std of h and of r (4, rows), numbers.
torch.library.define(
    "featkd::two_norms_rows",
    "(Tensor h, Tensor parameters, float eps, Tensor(a!) residual, Tensor(b!) normed, "
    "Tensor(c!) statistics) -> ()",
)
two_norms = torch.ops.featkd.two_norms_rows.default

# The gradient with respect to h as `slope`, which may be h; adds the parameters' to `sums`. The
# upstream ones are (B, N, C).
torch.library.define(
    "featkd::two_norms_rows_backward",
    "(Tensor h, Tensor parameters, Tensor statistics, Tensor? d_residual, Tensor? d_normed, "
    "Tensor(a!) slope, Tensor(b!)? sums) -> ()",
)
two_norms_backward = torch.ops.featkd.two_norms_rows_backward.default
