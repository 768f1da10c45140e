"""Data sheets of three GPUs."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
# limits of a multiprocessor, equal on the three
REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_RESERVED = 1024  # bytes of shared memory per block that CUDA keeps
# per multiprocessor (CUDA C++ Programming Guide, arithmetic instructions per compute capability)
_FP32_CORES = {80: 64, 90: 128, 100: 128}


def block_registers(registers: int, warps: int) -> int:
    """Returns the registers that a block takes: each thread gets a multiple of eight."""
    return -(-registers // 8) * 8 * 32 * warps


@dataclass(frozen=True)
class Chip:
    """A GPU by its data sheet; rates are dense, without structured sparsity."""

    name: str
    arch: int
    """Compute capability times ten."""
    shared_bytes: int
    """Largest shared memory of a block (CUDA C++ Programming Guide, technical specifications per
    compute capability)."""
    gb_per_s: float
    """Rate of the memory."""
    fp32_tflops: float
    """Rate without tensor cores."""
    fp64_tflops: float
    """Rate without tensor cores."""
    multiprocessors: int
    source: str

    @property
    def ghz(self) -> float:
        """Clock that the fp32 rate implies."""
        return self.fp32_tflops * 1e3 / (2 * self.multiprocessors * _FP32_CORES[self.arch])

    def blocks(self, registers: int, warps: int, shared: int) -> int:
        """Returns the number of blocks that a multiprocessor holds at once.

        Args:
            registers: registers per thread.
            warps: warps per block.
            shared: bytes of shared memory per block.
        """
        by_registers = REGISTERS // block_registers(registers, warps)
        by_shared = (self.shared_bytes + _RESERVED) // (shared + _RESERVED)
        return min(by_registers, by_shared, _WARPS // warps, _BLOCKS)


CHIPS = (
    Chip(
        "A100", 80, 163 * KIB, 2039, 19.5,
        9.7, 108, "NVIDIA A100 Tensor Core GPU data sheet, SXM4 80 GB; architecture white paper",
    ),
    Chip(
        "H100", 90, 227 * KIB, 3350, 67,
        34, 132, "NVIDIA H100 Tensor Core GPU data sheet, SXM; architecture white paper",
    ),
    Chip(
        "B200", 100, 227 * KIB, 8000, 80,
        40, 148, "NVIDIA Blackwell architecture technical brief, HGX B200 at 1,000 W; "
        "multiprocessors as CUDA reports them",
    ),
)  # fmt: skip


def chip_of(arch: int) -> Chip:
    """Returns the chip of an architecture.

    Raises:
        ValueError: the table has no such architecture.
    """
    for chip in CHIPS:
        if chip.arch == arch:
            return chip
    known = ", ".join(str(chip.arch) for chip in CHIPS)
    raise ValueError(f"archs: expected some of {known}, got {arch}")
