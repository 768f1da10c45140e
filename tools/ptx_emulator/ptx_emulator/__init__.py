"""Execution of compiled PTX on the CPU, with race checks and exact counters."""

from ptx_emulator.build import CompilerError
from ptx_emulator.emulator import Emulator
from ptx_emulator.operation import UnsupportedInstruction
from ptx_emulator.parser import PtxError
from ptx_emulator.reports import Counters, Launch, Report
from ptx_emulator.tensor_map import TensorMap
from ptx_emulator.triton import compile_triton, run_triton

__all__ = [
    "CompilerError",
    "Counters",
    "Emulator",
    "Launch",
    "PtxError",
    "Report",
    "TensorMap",
    "UnsupportedInstruction",
    "compile_triton",
    "run_triton",
]
