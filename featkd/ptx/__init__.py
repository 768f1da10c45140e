"""A test bench: runs compiled PTX on the CPU, with race checks and exact counters.

Nothing at run time imports it. See docs/ptx.md.
"""

from featkd.ptx.build import CompilerError
from featkd.ptx.emulator import Emulator
from featkd.ptx.parser import PtxError
from featkd.ptx.reports import Counters, Launch, Report
from featkd.ptx.site import UnsupportedInstruction
from featkd.ptx.tensor_map import TensorMap
from featkd.ptx.triton import run_triton

__all__ = [
    "CompilerError",
    "Counters",
    "Emulator",
    "Launch",
    "PtxError",
    "Report",
    "TensorMap",
    "UnsupportedInstruction",
    "run_triton",
]
