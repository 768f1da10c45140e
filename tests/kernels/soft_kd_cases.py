"""Problems for soft_kd, and evaluations by autograd to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd import reference
from tests.kernels.feature_kd_cases import relative


@dataclass(frozen=True)
class Problem:
    """Sizes, weights, and whether the labels are soft (they then do not sum to one)."""

    batch: int
    classes: int
    alpha: float = 0.9
    tau: float = 1.0
    soft: bool = False

    def __str__(self) -> str:
        kind = "soft" if self.soft else "index"
        return f"{self.batch}x{self.classes}-alpha{self.alpha}-tau{self.tau}-{kind}"

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
        """Student and teacher (None where alpha is 0), their logits up to about 10; labels."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.classes)
        student, teacher = (3 * torch.randn(2, *shape, generator=generator)).to(dtype).unbind()
        target = torch.randint(self.classes, (self.batch,), generator=generator)
        if self.soft:
            target = (1.3 * torch.randn(shape, generator=generator).softmax(1)).to(dtype)
        return student, teacher if self.alpha else None, target


def evaluate(
    student: Tensor, teacher: Tensor | None, target: Tensor, alpha: float, tau: float
) -> dict[str, Tensor]:
    """Loss and gradient by torch's own losses in float64."""
    x = student.detach().double().requires_grad_()
    loss = x.new_zeros(())
    if alpha < 1:
        labels = target.double() if target.dim() == 2 else target
        loss = loss + (1 - alpha) * F.cross_entropy(x, labels)
    if alpha > 0:
        log_t = (teacher.double() / tau).log_softmax(1)
        log_s = (x / tau).log_softmax(1)
        loss = loss + alpha * tau**2 * F.kl_div(
            log_s, log_t, log_target=True, reduction="batchmean"
        )
    (gradient,) = torch.autograd.grad(loss, x)
    return {"loss": loss.detach(), "student": gradient}


def by_reference(
    student: Tensor, teacher: Tensor | None, target: Tensor, alpha: float, tau: float
) -> dict[str, Tensor]:
    """The same by the plain backend in the student's dtype."""
    x = student.detach().clone().requires_grad_()
    loss = reference.soft_kd(x, teacher, target, alpha=alpha, tau=tau)
    (gradient,) = torch.autograd.grad(loss, x)
    return {"loss": loss.detach(), "student": gradient}


def assert_as_exact_as_eager(
    got: dict[str, Tensor],
    problem: Problem,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
) -> None:
    """Errors against float64 of at most twice those of plain torch, which computes in float32."""
    dtype = student.dtype
    exact = evaluate(student, teacher, target, problem.alpha, problem.tau)
    eager = by_reference(student, teacher, target, problem.alpha, problem.tau)
    tiny = 1e-14 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    for name, want in exact.items():
        assert got[name].dtype == eager[name].dtype
        if not want.norm():  # of a single class
            assert torch.equal(got[name].double(), want)
            continue
        allowed = 2 * relative(eager[name], want) + tiny
        error = relative(got[name], want)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


INF, NAN = math.inf, math.nan
# (student, teacher, label) of a row each, where the loss or the gradient is not finite, or nearly
SPECIAL_ROWS = [
    ([0.5, -INF, 1.0, 2.0], [1.0, 0.0, 0.5, 0.0], 2),  # a class that the student rules out
    ([0.5, 1.0, 1.0, 2.0], [1.0, -INF, 0.5, 0.0], 2),  # one that the teacher rules out
    ([0.5, -INF, 1.0, 2.0], [1.0, -INF, 0.5, 0.0], 2),  # both
    ([0.5, -INF, 1.0, 2.0], [1.0, 0.0, 0.5, 0.0], 1),  # the label
    ([-INF, -INF, -INF, -INF], [1.0, 0.0, 0.5, 0.0], 0),
    ([1.0, 0.0, 0.5, 0.0], [-INF, -INF, -INF, -INF], 0),
    ([INF, 0.0, 0.5, 0.0], [1.0, 0.0, 0.5, 0.0], 0),
    ([1.0, 0.0, 0.5, 0.0], [1.0, INF, 0.5, 0.0], 0),
    ([1.0, NAN, 0.5, 0.0], [1.0, 0.0, 0.5, 0.0], 0),
    ([1.0, 0.0, 0.5, 0.0], [1.0, NAN, 0.5, 0.0], 0),
    ([1.0, 0.0, 0.5, 0.0], [1.0, 0.0, 0.5, 0.0], 0),
    ([1e4, -1e4, 0.0, 0.0], [-80.0, 80.0, 0.0, 0.0], 1),
    ([3e4, 3e4, 3e4, 3e4 + 2], [0.0, 0.0, 0.0, 3.0], 3),
]


def special(soft: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The special rows as a batch, with labels that are zero elsewhere if soft."""
    student, teacher, label = (torch.tensor(x) for x in zip(*SPECIAL_ROWS, strict=True))
    return student, teacher, F.one_hot(label, 4).float() if soft else label


def assert_as_reference(
    losses: Tensor, gradient: Tensor, student: Tensor, teacher: Tensor, target: Tensor,
    alpha: float, tau: float,
) -> None:  # fmt: skip
    """Every row's loss and gradient of its sum are the plain backend's, NaN and Inf included."""
    for i in range(len(student)):
        row = slice(i, i + 1)
        used = teacher[row] if alpha else None
        want = by_reference(student[row], used, target[row], alpha, tau)
        for got, name in ((losses[i], "loss"), (gradient[row], "student")):
            torch.testing.assert_close(
                got,
                want[name],
                equal_nan=True,
                rtol=3e-6,
                # near agreement, both err by 5e-7 against float64: terms of order tau^2 cancel
                atol=1e-6,
                msg=lambda m, i=i: f"{i}: {m}",
            )
