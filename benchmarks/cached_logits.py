r"""What stored logits cost on a disk, in each form, and what the form does to the soft loss.

python -m featkd.benchmarks.cached_logits [--json FILE] [--out docs/cache-sizes.md]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from featkd.cache import Layout, Taught
from featkd.cli.arguments import Parser, add_json, check_folders
from featkd.functional import soft_kd

from .results import Measured, describe_run, meta_of, versions_of, write_json
from .table import aligned, grid, write_into

CLASSES = 1000
IMAGES = 512
TOPS = (None, 100, 50, 10, 5)
TAUS = (1.0, 2.0, 4.0)
# deviations of the made logits: their largest probability is 0.02, 0.2 and 0.5 in the mean
SPREADS = (1.0, 2.5, 5.0)
MARK = "cached-logits"
_HEADER = (
    "teacher's deviation", "classes kept", "bytes/image",
    *(f"{what}, tau {tau:g}" for tau in TAUS for what in ("loss", "dS")),
)  # fmt: skip


@dataclass(frozen=True)
class Error:
    """Of a form, at a spread of the teacher's logits and a temperature; relative."""

    spread: float
    tau: float
    loss: float
    """Signed."""
    gradient: float
    """L2, of the student's logits'."""


def measure(
    classes: int = CLASSES, images: int = IMAGES
) -> Iterator[tuple[str, float, list[Error]]]:
    """Each form's name, bytes an image and errors: made teachers beside a student of deviation 1.

    The loss is tau^2 KL alone; errors are against the logits as the teacher gave them.
    """
    for top in TOPS:
        if top is not None and top >= classes:
            continue
        layout = Layout(classes, "float32", top, "none", None, None, None, ())
        errors, size = [], 0.0
        for spread in SPREADS:
            teacher, student = _logits(spread, classes, images)
            rows = layout.encode(Taught(teacher, []))
            size = sum(x.nbytes for x in rows[0].values())
            held = layout.decode(rows, ()).logits
            assert held is not None
            errors += [Error(spread, tau, *_error(student, teacher, held, tau)) for tau in TAUS]
        yield "all" if top is None else str(top), size, errors


def _logits(spread: float, classes: int, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = spread * torch.randn(images, classes, generator=generator)
    return teacher, torch.randn(images, classes, generator=generator).requires_grad_()


def _error(student: Tensor, teacher: Tensor, held: Tensor, tau: float) -> tuple[float, float]:
    target = torch.zeros(len(student), dtype=torch.int64)
    losses = [soft_kd(student, x, target, alpha=1.0, tau=tau) for x in (teacher, held)]
    right, found = (torch.autograd.grad(loss, student)[0] for loss in losses)
    exact, loss = (x.item() for x in losses)
    return loss / exact - 1, float((found - right).norm() / right.norm())


def _lines(rows: Sequence[tuple[str, float, list[Error]]]) -> list[list[str]]:
    return [
        [
            f"{spread:g}",
            name,
            f"{size:,.0f}",
            *(
                x
                for e in errors
                if e.spread == spread
                for x in (f"{e.loss:+.1e}", f"{e.gradient:.1e}")
            ),
        ]
        for spread in SPREADS
        for name, size, errors in rows
    ]


def _measured(name: str, size: float, errors: Sequence[Error]) -> list[Measured]:
    form = f"top {name}"
    found: list[Measured] = [("cached_logits", form, "bytes", "bytes/image", size)]
    for e in errors:
        at = f"cached_logits/std {e.spread:g}/tau {e.tau:g}"
        found += [(at, form, "loss_error", "ratio", e.loss)]
        found += [(at, form, "student_gradient_error", "ratio", e.gradient)]
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print the table; write it where asked."""
    parser = Parser(
        prog="featkd.benchmarks.cached_logits",
        description="sizes and errors of a teacher's stored logits",
    )
    add_json(parser)
    parser.add_argument(
        "--out", type=str, default=None, metavar="FILE.md", help="a document with marks"
    )
    options = parser.parse_args(words)
    check_folders(options, ("json", "out"))
    run = describe_run("cpu")
    about = f"normal logits of {CLASSES:,} classes, {IMAGES} images; {versions_of(run)}"
    rows = list(measure())
    lines = _lines(rows)
    print(about)
    print(aligned(_HEADER, lines, numbers=True))
    if options.json is not None:
        figures = [figure for row in rows for figure in _measured(*row)]
        write_json(Path(options.json), meta_of(run) | {"about": about}, figures)
    if options.out is not None:
        write_into(Path(options.out), MARK, f"{grid(_HEADER, lines)}\n{about}.\n")


if __name__ == "__main__":
    main()
