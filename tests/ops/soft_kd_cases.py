"""Test problems for soft_kd, with references in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.functional import soft_kd
from tests.ops.comparing import Comparable, Tensors, normal


@dataclass(frozen=True)
class Problem(Comparable):
    """Sizes and weights. Soft labels do not sum to one."""

    constant: ClassVar[tuple[str, ...]] = ("teacher", "target")

    batch: int
    classes: int
    alpha: float = 0.9
    tau: float = 1.0
    soft: bool = False

    def __str__(self) -> str:
        kind = "soft" if self.soft else "index"
        return f"{self.batch}x{self.classes}-alpha{self.alpha}-tau{self.tau}-{kind}"

    def inputs(self, dtype: torch.dtype, others: torch.dtype | None = None) -> Tensors:
        """Student, teacher (for every alpha) and target; logits are up to about 10."""
        g, shape = torch.Generator().manual_seed(0), (self.batch, self.classes)
        target = torch.randint(self.classes, (self.batch,), generator=g)
        if self.soft:
            target = (1.3 * normal(g, *shape).softmax(1)).to(others or dtype)
        student, teacher = (normal(g, *shape, scale=3) for _ in range(2))
        return {
            "student": student.to(dtype), "teacher": teacher.to(others or dtype), "target": target,
        }  # fmt: skip

    def fused(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensors:
        """The loss by featkd."""
        return {"loss": soft_kd(student, teacher, target, alpha=self.alpha, tau=self.tau)}

    def plain(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensors:
        """The loss by torch's cross-entropy and divergence, in float32 or float64."""
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        x, loss = student.to(dtype), torch.zeros((), dtype=dtype)
        if self.alpha < 1:
            labels = target.to(dtype) if self.soft else target
            loss = loss + (1 - self.alpha) * F.cross_entropy(x, labels)
        if self.alpha > 0:
            log_t = (teacher.to(dtype) / self.tau).log_softmax(1)
            log_s = (x / self.tau).log_softmax(1)
            divergence = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
            loss = loss + self.alpha * self.tau**2 * divergence
        return {"loss": loss}

    def upstream(self, inputs: Tensors, loss: float = 3.0) -> Tensors:
        """Gradient of the loss."""
        wide = torch.float64 if inputs["student"].dtype == torch.float64 else torch.float32
        return {"loss": torch.tensor(loss, dtype=wide)}


INF, NAN = math.inf, math.nan
# rows (student, teacher, label) for which the loss or its gradient is infinite, NaN or very large
SPECIAL_ROWS = [
    ([0.5, -INF, 1.0, 2.0], [1.0, 0.0, 0.5, 0.0], 2),  # student's probability of a class is 0
    ([0.5, 1.0, 1.0, 2.0], [1.0, -INF, 0.5, 0.0], 2),  # teacher's probability is 0
    ([0.5, -INF, 1.0, 2.0], [1.0, -INF, 0.5, 0.0], 2),  # both are 0
    ([0.5, -INF, 1.0, 2.0], [1.0, 0.0, 0.5, 0.0], 1),  # student's probability of the label is 0
    ([-INF, -INF, -INF, -INF], [1.0, 0.0, 0.5, 0.0], 0),
    ([INF, 0.0, 0.5, 0.0], [1.0, 0.0, 0.5, 0.0], 0),
    ([1.0, 0.0, 0.5, 0.0], [1.0, INF, 0.5, 0.0], 0),
    ([1.0, NAN, 0.5, 0.0], [1.0, 0.0, 0.5, 0.0], 0),
    ([1.0, 0.0, 0.5, 0.0], [1.0, NAN, 0.5, 0.0], 0),
    ([1e4, -1e4, 0.0, 0.0], [-80.0, 80.0, 0.0, 0.0], 1),
    ([3e4, 3e4, 3e4, 3e4 + 2], [0.0, 0.0, 0.0, 3.0], 3),
]


def assert_special_rows(alpha: float, tau: float, soft: bool) -> None:
    """Checks that each row gives the result of the equation in IEEE arithmetic, as in torch."""
    for student, teacher, label in SPECIAL_ROWS:
        target = torch.tensor([label])
        inputs = {
            "student": torch.tensor([student]),
            "teacher": torch.tensor([teacher]),
            "target": F.one_hot(target, 4).float() if soft else target,
        }
        problem = Problem(1, 4, alpha, tau, soft)
        got, want = problem.run(inputs), problem.run(inputs, by_torch=True)
        for name, x in want.items():
            torch.testing.assert_close(
                got[name], x, equal_nan=True, rtol=1e-5, atol=1e-5, msg=f"{student}, {teacher}"
            )
