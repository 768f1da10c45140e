"""Run in a process of its own under TRITON_INTERPRET=1: the kernels themselves, in float64.

python -m tests.kernels.interpreted gradcheck
python -m tests.kernels.interpreted mutants
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from featkd import kernels as package
from featkd.ops.projected_feature_kd import _factor
from tests.kernels.feature_kd_cases import Problem, evaluate, relative

PROBLEMS = [
    Problem(2, 15, 24, 40, 5, bias=True),
    Problem(3, 8, 20, 24, 4),
    Problem(3, 9, 16, 33, 0, norm="none", bias=True),
    Problem(5, 12, 36, 36, 4, projector=False, norm="none"),
]
# (name, file, what stands there, what a slip would have put there)
MUTANTS = [
    ("zeroed gradient", "projected_feature_kd", "sums[k], k, CS", "sums[k] * 0, k, CS"),
    (
        "gradient of the wrong sign",
        "projected_feature_kd",
        "rstd[:, None] * (g",
        "-rstd[:, None] * (g",
    ),
    ("dropped mean(g)", "projected_feature_kd", "(g - mean_g[:, None] - ", "(g - "),
    ("dropped mean(g x_hat)", "projected_feature_kd", " - normed * mean_gx[:, None])", ")"),
    (
        "dropped gamma",
        "projected_feature_kd",
        "g = half * rows.load_channels(gamma, j, CT, CT_BLOCK, ACC)[None, :]",
        "g = half",
    ),
    (
        "dropped epsilon",
        "projected_feature_kd",
        "squares / CT + eps",
        "squares / CT + 2 * eps + 1e-3",
    ),
    (
        "dropped spectral term",
        "rows",
        "total = rows + plain + sign * alternating",
        "total = rows + plain",
    ),
    (
        "dropped row sums",
        "rows",
        "total = rows + plain + sign * alternating",
        "total = rows + sign * alternating",
    ),
    (
        "alternating sum at odd widths",
        "rows",
        "tl.where(width % 2 == 0, alternating, 0.0)",
        "alternating",
    ),
    (
        "skipped last tile",
        "projected_feature_kd",
        "programs = triton.cdiv(",
        "programs = -1 + triton.cdiv(",
    ),
    (
        "skipped last channel block",
        "projected_feature_kd",
        "for j in range(BLOCKS):",
        "for j in range(BLOCKS - 1):",
    ),
    (
        "skipped last split",
        "projected_feature_kd",
        "(split + 1) * tiles)",
        "(split + 1) * tiles - split)",
    ),
    ("wrong stride of the weight", "rows", "out[:, None] * stride", "out[:, None] * (stride - 1)"),
    (
        "wrong stride of the teacher",
        "projected_feature_kd",
        "image * teacher_image",
        "image * student_image",
    ),
    (
        "swapped statistics",
        "rows",
        "tl.join(tl.join(a, c), tl.join(b, d))",
        "tl.join(tl.join(a, d), tl.join(b, c))",
    ),
    ("dropped bias", "rows", "total += load_channels(bias", "total += 0 * load_channels(bias"),
]


def errors(kernels: ModuleType, problem: Problem) -> dict[str, float]:
    """Relative errors in float64 of the loss and every gradient, by the kernels of a module."""
    small = kernels.Config(16, 16, 32, num_warps=1)
    kernels.loss_config = kernels.gradient_config = lambda *_: small
    kernels.split_count = lambda rows: 2
    tensors = problem.tensors(torch.float64)
    student, teacher, *parameters = tensors
    names = ("weight", "bias", "norm_weight", "norm_bias")
    arguments = {"width": problem.width, "compute": torch.float64}
    bundle = kernels.Parameters(*parameters)
    total, d_student, statistics = kernels.forward(
        student, teacher, bundle, eps=1e-5, need_student=True, need_parameters=True, **arguments
    )
    factor = _factor(teacher, problem.width)
    got = {"loss": total * factor, "student": 2 * factor * d_student}
    d_weight, vectors = kernels.backward(student, teacher, bundle, statistics, **arguments)
    for name, parameter, value in zip(names, parameters, [d_weight, *vectors], strict=True):
        if parameter is not None:
            got[name] = 2 * factor * value
    want = evaluate(tensors, problem.width, torch.float64)
    assert set(got) == set(want)
    return {name: relative(got[name].nan_to_num(1e9), x) for name, x in want.items()}


def gradcheck() -> None:
    """float64 against autograd, and torch's numerical gradients through the public function."""
    from featkd.kernels import projected_feature_kd as kernels

    import featkd
    from featkd.functional import projected_feature_kd

    for problem in PROBLEMS:
        found = errors(kernels, problem)
        assert max(found.values()) < 1e-13, (str(problem), found)
    for width in (0, 2, 3):
        tensors = Problem(1, 6, 3, 5, width, bias=True).tensors(torch.float64)
        leaves = [x.requires_grad_() for i, x in enumerate(tensors) if i != 1]
        metric, grid = ("spectral", (6 // width, width)) if width else ("mse", None)

        def loss(student, *parameters, teacher=tensors[1], metric=metric, grid=grid):
            return projected_feature_kd(student, teacher, *parameters, metric=metric, grid=grid)

        with featkd.use_backend("triton"):
            torch.autograd.gradcheck(loss, leaves)
        assert featkd.last_backend("projected_feature_kd") == "triton"
    print("gradcheck passed")


def mutants() -> None:
    """Prints each mutant's largest error over the problems: a slip that stays small is not seen."""
    folder = Path(tempfile.mkdtemp())
    sys.path.insert(0, str(folder))
    source = Path(next(iter(package.__path__)))
    for i, (name, file, there, slip) in enumerate([("none", "rows", "", ""), *MUTANTS]):
        copy = folder / f"mutant{i}"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for path in copy.glob("*.py"):
            text = path.read_text().replace("featkd.kernels", copy.name)
            if path.stem == file and there:
                assert there in text, f"{name}: not in {file}"
                text = text.replace(there, slip)
            path.write_text(text)
        kernels = importlib.import_module(f"{copy.name}.projected_feature_kd")
        worst = max(max(errors(kernels, problem).values()) for problem in PROBLEMS)
        print(f"{name}\t{worst:.3e}")


if __name__ == "__main__":
    {"gradcheck": gradcheck, "mutants": mutants}[sys.argv[1]]()
