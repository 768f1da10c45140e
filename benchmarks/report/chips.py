"""Limits of three GPUs.

From the CUDA C++ Programming Guide, technical specifications per compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
# limits of a multiprocessor, equal on the three
REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_RESERVED = 1024  # bytes of shared memory per block that CUDA keeps


def block_registers(registers: int, warps: int) -> int:
    """Returns the registers that a block takes: each thread gets a multiple of eight."""
    return -(-registers // 8) * 8 * 32 * warps


@dataclass(frozen=True)
class Chip:
    """A GPU."""

    name: str
    shared_bytes: int
    """Largest shared memory of a block."""

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


CHIPS = {80: Chip("A100", 163 * KIB), 90: Chip("H100", 227 * KIB), 100: Chip("B200", 227 * KIB)}
"""Chips by compute capability times ten."""
