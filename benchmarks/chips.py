"""What the makers say of three GPUs."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
# of a multiprocessor: the same on the three
REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_RESERVED = 1024  # bytes of shared memory that CUDA keeps of each block
# of a multiprocessor (CUDA C++ Programming Guide, arithmetic instructions per compute capability)
_FP32_CORES = {80: 64, 90: 128, 100: 128}


def block_registers(registers: int, warps: int) -> int:
    """Registers that a block takes: each thread gets a multiple of eight."""
    return -(-registers // 8) * 8 * 32 * warps


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

    def blocks(self, registers: int, warps: int, shared: int) -> int:
        """Blocks that a multiprocessor holds at once.

        Args:
            registers: of a thread.
            warps: of a block.
            shared: bytes of a block.
        """
        by_registers = REGISTERS // block_registers(registers, warps)
        # a block may have all but what is kept of it
        by_shared = (self.shared_bytes + _RESERVED) // (shared + _RESERVED)
        return min(by_registers, by_shared, _WARPS // warps, _BLOCKS)


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
