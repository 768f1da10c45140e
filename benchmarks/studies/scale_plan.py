"""Modelled update of a published run on many GPUs; nothing is measured.

`python -m benchmarks.studies.scale_plan [--out docs/scale.md]` prints the table, or writes it
between the document's marks `<!-- bench scale-plan -->` and `<!-- end bench scale-plan -->`. All
assumptions and their sources are in `Assumed`; the operations are counted on the models.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from featkd.models import create_student, create_teacher
from featkd.train.dryrun import count_flops

from ..report.chips import CHIPS, Chip
from ..table import write_into

NAME = "scale-plan"


@dataclass(frozen=True)
class Assumed:
    """Assumptions; the defaults are those of eight DGX H100."""

    gpus: int = 64
    gpus_per_node: int = 8
    cores_per_gpu: int = 14
    """DGX H100 data sheet: 112 cores, 8 GPUs."""
    share_of_peak: float = 0.3
    """Share of the tensor cores' bf16 rate over a whole update. Assumed: narrow models reach less
    than half of the rate."""
    network_gb_per_s: float = 50.0
    """Rate to and from each GPU. DGX H100 data sheet: one 400 Gb/s InfiniBand port per GPU."""
    hop_us: float = 20.0
    """Latency of a hop between nodes, launch included. Assumed."""
    host_gb_per_s: float = 50.0
    """Rate from host to GPU. Assumed: four fifths of the 63 GB/s of PCIe 5.0 x16."""
    images_per_core_s: float = 180.0
    """Measured (docs/lab-notes.md): timm's loader with the published augmentation."""
    dali_main_ms: float = 0.25
    """Measured (docs/results.md): time per image of the DALI loader in the main thread of each
    process, which more cores do not shorten."""
    image_kb: float = 110.0
    """ImageNet's training set: 138 GB in 1.28 million files."""


@dataclass(frozen=True)
class Work:
    """Work of a published run."""

    teacher_flops: int
    """Operations of the forward pass of one image."""
    student_flops: int
    """Operations of the forward and backward pass of one image."""
    gradient_bytes: int
    """Bytes that the ranks sum in each update."""
    img_size: int = 224


def published_work() -> Work:
    """Counts the work of DeiT-Tiny with WideLast from CaiT-S24 at 224 x 224 ([EM26])."""
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
    """Modelled milliseconds of one update on each GPU."""

    chip: Chip
    images: int
    """Images per GPU."""
    teacher: float
    student: float
    all_reduce: float
    """Hidden behind the backward pass, unless it takes longer."""
    host_copy: float
    """Done by the loop on the stream that computes, so that nothing hides it."""
    loader: float
    """timm's loader on the GPU's share of the cores, hidden behind the update before."""

    @property
    def compute(self) -> float:
        """Time on the GPU. The backward pass, two thirds of the student, hides the all-reduce."""
        shown = max(0.0, self.all_reduce - self.student * 2 / 3)
        return self.host_copy + self.teacher + self.student + shown

    @property
    def total(self) -> float:
        """The longer of what runs side by side."""
        return max(self.compute, self.loader)

    @property
    def limit(self) -> str:
        """Name of the longer one."""
        return "GPU" if self.compute > self.loader else "loader"


def model_update(work: Work, chip: Chip, images: int, assumed: Assumed) -> Update:
    """Models an update with `images` per GPU."""
    flops_per_ms = chip.tensor_tflops["bf16"] * assumed.share_of_peak * 1e9
    n = assumed.gpus
    # A ring sends and receives 2 (n - 1) / n of the gradients at each GPU; a tree has the fewest
    # hops. NCCL chooses: the bytes of the one and the hops of the other are a lower bound.
    moved = 2 * (n - 1) / n * work.gradient_bytes
    hops = 2 * math.ceil(math.log2(max(1, n // assumed.gpus_per_node)))
    image_bytes = 3 * work.img_size**2 * 4  # the loader's float32
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
    """Returns the plan as a table, with a line on its assumptions."""
    lines = [
        "| GPU | images per GPU | teacher ms | student ms | all-reduce ms | host copy ms | "
        "loader ms | images/s, GPUs alone | with the loader | cores per GPU to feed it "
        "| first limit |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n"
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
        f"\nModelled, not measured:\n\n"
        f"- {assumed.gpus} GPUs at {assumed.share_of_peak:.0%} of their bf16 peak; "
        f"{work.gradient_bytes / 1e6:.1f} MB of gradients at {assumed.network_gb_per_s:g} GB/s "
        "per GPU.\n"
        f"- {work.teacher_flops / 1e9:.1f} Gflop per image for the teacher and "
        f"{work.student_flops / 1e9:.1f} for the student's two passes.\n"
        f"- {assumed.cores_per_gpu} cores per GPU with {assumed.images_per_core_s:g} images/s each "
        f"(measured elsewhere): {fed:,.0f} images/s,\n"
        f"  which read {fed * assumed.image_kb / 1e6:.0f} GB/s of files.\n"
        f"- DALI in place of timm's loader feeds at most {1e3 / assumed.dali_main_ms:,.0f} "
        f"images/s per GPU, {assumed.gpus * 1e3 / assumed.dali_main_ms:,.0f} to all:\n"
        f"  {assumed.dali_main_ms:g} ms per image in each process's main thread.\n"
    )
    return "".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table, or writes it into a document."""
    parser = argparse.ArgumentParser(description="Models an update on many GPUs.")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.md", help="document")
    options = parser.parse_args(words)
    text = markdown(published_work(), Assumed())
    if options.out is None:
        print(text, end="")
    else:
        write_into(options.out, NAME, text)


if __name__ == "__main__":
    main()
