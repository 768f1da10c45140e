"""What an update of a published run would take on many GPUs, on paper: no figure is measured here.

`python -m featkd.benchmarks.scale_plan [--out docs/scale.md]` prints the table, or puts it
between the document's marks `<!-- bench scale-plan -->` and `<!-- end bench scale-plan -->`.
Everything assumed is in `Assumed`, with its source; flops come from the models themselves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from featkd.models import create_student, create_teacher
from featkd.train.dryrun import count_flops

from .chips import CHIPS, Chip
from .table import write_into

NAME = "scale-plan"


@dataclass(frozen=True)
class Assumed:
    """What the plan takes for granted; the defaults are a DGX H100's, eight of them."""

    gpus: int = 64
    gpus_per_node: int = 8
    cores_per_gpu: int = 14
    """DGX H100 data sheet: 112 cores, 8 GPUs."""
    share_of_peak: float = 0.3
    """Of the tensor cores' bf16 rate, all of an update together: an assumption, as narrow models
    reach less than the half and more that large ones do."""
    network_gb_per_s: float = 50.0
    """To and from each GPU: DGX H100 data sheet, one 400 Gb/s InfiniBand port a GPU."""
    hop_us: float = 20.0
    """Latency of a hop between nodes, launch included: an assumption."""
    host_gb_per_s: float = 50.0
    """Host to GPU: PCIe 5.0 x16 has 63 GB/s in each direction; four fifths of it assumed."""
    images_per_core_s: float = 180.0
    """Measured: timm's loader, published augmentation, 250 ImageNet photographs of 112 kB, images
    per second of CPU time of one process, median of four epochs; virtual AMD EPYC, 2 cores."""
    dali_main_ms: float = 0.25
    """Measured (docs/results.md): what of an image the DALI loader does in the main thread of each
    process, decisions and the arrays of them: no more cores make that faster."""
    image_kb: float = 110.0
    """ImageNet's training set: 138 GB in 1.28 million files."""


@dataclass(frozen=True)
class Work:
    """A published run's work.

    Attributes:
        teacher_flops: forward pass of one image.
        student_flops: forward and backward pass of one image.
        gradient_bytes: that the ranks sum with each update.
    """

    teacher_flops: int
    student_flops: int
    gradient_bytes: int
    img_size: int = 224


def published_work() -> Work:
    """DeiT-Tiny with WideLast from CaiT-S24 at 224 x 224 ([EM26])."""
    with torch.device("meta"):
        student = create_student("deit_tiny_patch16_224", "widelast", 384, 1000)
        teacher = create_teacher("cait_s24_224", pretrained=False)
    parameters = sum(p.numel() for p in student.parameters())
    return Work(
        teacher_flops=count_flops(teacher, 224),
        student_flops=count_flops(student, 224, backward=True),
        gradient_bytes=4 * parameters,  # autocast keeps weights and gradients in float32
    )


@dataclass(frozen=True)
class Update:
    """One update of `images` a GPU, in modelled milliseconds on each of the GPUs."""

    chip: Chip
    images: int
    teacher: float
    student: float
    all_reduce: float
    """Hidden behind the backward pass as long as that takes longer."""
    host_copy: float
    """By the loop itself, on the stream that computes: hidden behind nothing."""
    loader: float
    """timm's, on the GPU's share of the cores; hidden behind the update before."""

    @property
    def compute(self) -> float:
        """What the GPU itself is busy for: backward, two thirds of the student, hides the sums."""
        shown = max(0.0, self.all_reduce - self.student * 2 / 3)
        return self.host_copy + self.teacher + self.student + shown

    @property
    def total(self) -> float:
        """The slowest of what runs side by side."""
        return max(self.compute, self.loader)

    @property
    def limit(self) -> str:
        """What that is."""
        return "GPU" if self.compute > self.loader else "loader"


def model_update(work: Work, chip: Chip, images: int, assumed: Assumed) -> Update:
    """Modelled times of an update with `images` a GPU."""
    flops_per_ms = chip.tensor_tflops["bf16"] * assumed.share_of_peak * 1e9
    n = assumed.gpus
    # A ring sends and receives 2 (n - 1) / n of the gradients at each GPU; a tree has the fewest
    # hops. NCCL picks: the bytes of the one and the hops of the other bound it from below.
    moved = 2 * (n - 1) / n * work.gradient_bytes
    hops = 2 * math.ceil(math.log2(max(1, n // assumed.gpus_per_node)))
    image_bytes = 3 * work.img_size**2 * 4  # float32, as the loader hands them over
    return Update(
        chip=chip,
        images=images,
        teacher=images * work.teacher_flops / flops_per_ms,
        student=images * work.student_flops / flops_per_ms,
        all_reduce=moved / assumed.network_gb_per_s / 1e6 + hops * assumed.hop_us / 1e3,
        host_copy=images * image_bytes / assumed.host_gb_per_s / 1e6,
        loader=images / (assumed.cores_per_gpu * assumed.images_per_core_s) * 1e3,
    )


def markdown(work: Work, assumed: Assumed, batches: Sequence[int] = (32, 512)) -> str:
    """The plan as a table, and a line on what it says."""
    lines = [
        "| GPU | images a GPU | teacher ms | student ms | all-reduce ms | host copy ms | "
        "loader ms | images/s, GPUs alone | with the loader | cores a GPU to feed it | first limit "
        "|\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n"
    ]
    for chip in CHIPS:
        for images in batches:
            update = model_update(work, chip, images, assumed)
            rate = assumed.gpus * images * 1e3
            cores = images * 1e3 / update.compute
            times = (
                update.teacher, update.student, update.all_reduce, update.host_copy, update.loader
            )  # fmt: skip
            cells = [
                chip.name,
                str(images),
                *(f"{ms:.2g}" if ms < 10 else f"{ms:.0f}" for ms in times),
                f"{rate / update.compute:,.0f}",
                f"{rate / update.total:,.0f}",
                f"{cores / assumed.images_per_core_s:.0f}",
                update.limit,
            ]
            lines.append(f"| {' | '.join(cells)} |\n")
    fed = assumed.gpus * assumed.cores_per_gpu * assumed.images_per_core_s
    lines.append(
        f"\nModelled, not measured: {assumed.gpus} GPUs, {assumed.share_of_peak:.0%} of the bf16 "
        f"peak, {work.teacher_flops / 1e9:.1f} Gflop an image for the teacher and "
        f"{work.student_flops / 1e9:.1f} for the student's two passes, "
        f"{work.gradient_bytes / 1e6:.1f} MB of gradients at {assumed.network_gb_per_s:g} GB/s a "
        f"GPU, {assumed.cores_per_gpu} cores a GPU with {assumed.images_per_core_s:g} images/s "
        f"each (measured elsewhere): {fed:,.0f} images/s, which read "
        f"{fed * assumed.image_kb / 1e6:.0f} GB/s of files. In place of timm's loader DALI would "
        f"feed at most {1e3 / assumed.dali_main_ms:,.0f} images/s to a GPU, "
        f"{assumed.gpus * 1e3 / assumed.dali_main_ms:,.0f} to all: {assumed.dali_main_ms:g} ms an "
        "image in each process's main thread.\n"
    )
    return "".join(lines)


def main(words: Sequence[str]) -> int:
    """Print the table, or with `--out FILE` put it into a document."""
    text = markdown(published_work(), Assumed())
    if not words:
        print(text, end="")
        return 0
    if len(words) != 2 or words[0] != "--out":
        print(f"scale_plan: expected nothing or --out FILE.md, got {words}", file=sys.stderr)
        return 2
    write_into(Path(words[1]), NAME, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
