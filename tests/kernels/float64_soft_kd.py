"""soft_kd's kernels in float64: problems, slips to plant, gradcheck."""

from __future__ import annotations

from types import ModuleType

import torch

from tests.kernels.feature_kd_cases import relative
from tests.kernels.soft_kd_cases import Problem, evaluate
from tests.ops.test_soft_kd import views

PROBLEMS = [
    Problem(3, 20, tau=2.0),
    Problem(3, 20, alpha=0.6, soft=True),
]
# (name, what stands in the kernels, what a slip would have put there)
MUTANTS = [
    ("zeroed gradient", "valid, slope, k, CLASSES", "valid, slope * 0, k, CLASSES"),
    ("missing tau^2", "alpha * tau**2", "alpha"),
    ("missing tau in the gradient", "kl_slope *= per_tau", "kl_slope *= 1.0"),
    ("missing tau in the divergence", "divergence *= per_tau", "divergence *= 1.0"),
    ("missing tau in the softmaxes", "x = x * per_tau", "x = x * 1.0"),
    ("dropped CE in the loss", "loss += ce_weight *", "loss += 0 * ce_weight *"),
    ("dropped KL in the loss", "loss += kl_weight *", "loss += 0 * kl_weight *"),
    ("dropped CE in the gradient", "slope += tl.exp(x) * of_p", "slope += 0 * of_p"),
    ("dropped KL in the gradient", "slope += _exp(x, per_tau", "slope += 0 * _exp(x, per_tau"),
    ("dropped label", "tl.where(here, ce_weight, 0.0)", "tl.where(here, 0.0, 0.0)"),
    ("dropped soft label", "- ce_weight * y.to(ACC)", "- 0 * y.to(ACC)"),
    ("label of the next class", "== label[:, None]", "== label[:, None] + 1"),
    ("soft labels taken to sum to one", "mass = tl.sum(mass, 1)", "mass = tl.sum(mass, 1) * 0 + 1"),
    ("dropped partition function", "tl.log(sum_s) - tl.log(sum_t)", "tl.log(sum_s)"),
    ("gradient of the teacher's sign", "WARM) * of_s - _exp(z", "WARM) * of_s + _exp(z"),
    ("no maximum taken off", "x = x.to(ACC) - x_top", "x = x.to(ACC) - 0 * x_top"),
    ("sums over the padding", "return tl.where(mask, values, 0.0)", "return values"),
    ("wrong stride of the teacher", "row * teacher_row", "row * student_row"),
    ("wrong stride of the labels", "row * target_row", "row * 1"),
    ("skipped last row", "valid = row < batch\n", "valid = row < batch - 1\n"),
    ("skipped last block", "for k in range(BLOCKS):", "for k in range(BLOCKS - 1):"),
    ("missing upstream gradient", "upstream / grad", "torch.ones_like(upstream) / grad"),
    ("missing mean", "upstream / gradient.shape[0]", "upstream"),
    ("dropped scale", " * tl.load(factor)", ""),
]


def errors(kernels: ModuleType, problem: Problem) -> dict[str, float]:
    """Relative errors in float64 of the loss and the gradient, by the kernels of a module."""
    kernels.config = lambda *_: kernels.Config(2, 16, num_warps=1)
    student, teacher, target = problem.tensors(torch.float64)
    # a row whose exponentials overflow, and logits a hundred below a row's largest
    student[1] += 1000
    student[2, 0] -= 100
    want = evaluate(student, teacher, target, problem.alpha, problem.tau)
    teacher = views(teacher)["sliced"]
    target = views(target)["sliced"] if problem.soft else target.repeat_interleave(2)[::2]
    losses, gradient = kernels.forward(
        student, teacher, target, alpha=problem.alpha, tau=problem.tau, need_gradient=True
    )
    upstream = torch.tensor(-3.0, dtype=torch.float64)
    got = {"loss": losses.mean(), "student": kernels.backward(gradient, upstream) / -3}
    return {name: relative(got[name].nan_to_num(1e9), x) for name, x in want.items()}


def worst(kernels: ModuleType) -> float:
    """The largest error, or the first that shows a slip; what is not written is NaN."""
    torch.use_deterministic_algorithms(True)  # fills empty tensors
    assert torch.empty(1).isnan()
    largest = 0.0
    for problem in PROBLEMS:
        largest = max(largest, *errors(kernels, problem).values())
        if largest > 1e-3:
            break
    return largest


def gradcheck() -> None:
    """torch's numerical gradients through the public function."""
    import featkd
    from featkd.functional import soft_kd

    for alpha, tau, soft in ((0.6, 1.0, False), (0.6, 2.0, True)):
        student, teacher, target = Problem(2, 4, alpha, tau, soft).tensors(torch.float64)

        def loss(x, z=teacher, y=target, alpha=alpha, tau=tau):
            return soft_kd(x, z, y, alpha=alpha, tau=tau)

        with featkd.use_backend("triton"):
            torch.autograd.gradcheck(loss, student.requires_grad_())
        assert featkd.last_backend("soft_kd") == "triton"
