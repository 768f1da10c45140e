"""What the makers say of three GPUs, and the time that a kernel would take at those rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KIB = 1024
# of a multiprocessor (CUDA C++ Programming Guide, arithmetic instructions per compute capability)
_FP32_CORES = {80: 64, 90: 128, 100: 128}


@dataclass(frozen=True)
class Chip:
    """A GPU by its data sheet: dense rates, without structured sparsity."""

    name: str
    arch: int
    """Compute capability, times ten."""
    shared_bytes: int
    """Most shared memory that a block can have (CUDA C++ Programming Guide, technical
    specifications per compute capability)."""
    gb_per_s: float
    """Of its memory."""
    tensor_tflops: dict[str, float]
    """Of the tensor cores, by the type of the operands."""
    fp32_tflops: float
    """Of the other cores."""
    fp64_tflops: float
    """Of the other cores."""
    multiprocessors: int
    source: str

    @property
    def ghz(self) -> float:
        """The clock that its fp32 rate implies."""
        return self.fp32_tflops * 1e3 / (2 * self.multiprocessors * _FP32_CORES[self.arch])


CHIPS = (
    Chip(
        "A100", 80, 163 * KIB, 2039, {"bf16": 312, "f16": 312, "tf32": 156}, 19.5,
        9.7, 108, "NVIDIA A100 Tensor Core GPU data sheet, SXM4 80 GB; architecture white paper",
    ),
    Chip(
        "H100", 90, 227 * KIB, 3350, {"bf16": 989, "f16": 989, "tf32": 494}, 67,
        34, 132, "NVIDIA H100 Tensor Core GPU data sheet, SXM; tensor rates there are with "
        "sparsity: halved; architecture white paper",
    ),
    Chip(
        "B200", 100, 227 * KIB, 8000, {"bf16": 2250, "f16": 2250, "tf32": 1100}, 80,
        40, 148, "NVIDIA Blackwell architecture technical brief, HGX B200 at 1,000 W; "
        "multiprocessors as CUDA reports them",
    ),
)  # fmt: skip


def chip_of(arch: int) -> Chip:
    """The chip of an architecture.

    Raises:
        ValueError: an architecture that the table lacks.
    """
    for chip in CHIPS:
        if chip.arch == arch:
            return chip
    known = ", ".join(str(chip.arch) for chip in CHIPS)
    raise ValueError(f"archs: expected some of {known}; got {arch}")


def modelled_us(chip: Chip, moved: float, flops: Mapping[str, float]) -> float:
    """Microseconds if memory or arithmetic ran at the data sheet's rate, the longer of the two.

    A bound from below: no latency, no L2 traffic, no launch.

    Args:
        moved: bytes from and to memory.
        flops: by class as `featkd.ptx` counts them: "mma.bf16", "fma.f32", ...
    """
    tensor = sum(
        count / chip.tensor_tflops[kind.removeprefix("mma.")]
        for kind, count in flops.items()
        if kind.startswith("mma.")
    )
    other = sum(count for kind, count in flops.items() if not kind.startswith("mma."))
    return max(moved / chip.gb_per_s / 1e3, tensor / 1e6, other / chip.fp32_tflops / 1e6)
