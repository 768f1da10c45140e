"""Kernels compiled ahead of time: what the machine code of each holds, on any architecture."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import featkd
from featkd.kernels.launch import redirect
from featkd.ptx.triton import compile_triton

from .problem import Case


@dataclass(frozen=True)
class Recorded:
    """A launch as an op makes it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Code:
    """What a compiled kernel uses."""

    registers: int
    """A thread's."""
    stack: int
    """Bytes a thread: registers that did not fit, and arrays."""
    spills: int
    """Instructions that read or write local memory."""
    shared: int
    """Bytes a block."""
    products: bool
    """Whether the source multiplies matrices."""
    tensor_core: int
    """Instructions that do so on tensor cores."""
    instructions: str
    """Their names: HMMA on all chips, HGMMA on sm_90, UTC...MMA on sm_100; "" for none."""
    loads: int
    """Instructions that read global memory, asynchronous copies included."""
    wide_loads: int
    """Those of 16 bytes a thread."""
    doubles: int
    """Arithmetic instructions in float64."""
    aligned: bool
    """Whether the rows of every tensor begin at multiples of 16 bytes, as a 16-byte load needs."""


def record(case: Case, arch: int) -> list[Recorded]:
    """The launches of a case's forward and backward pass on `arch`; nothing runs.

    Raises:
        ValueError: the op does not run on Triton.
    """
    found: list[Recorded] = []

    def keep(kernel: Any, grid: tuple[int, ...], arguments: Any, options: Any) -> None:
        found.append(Recorded(kernel, grid, dict(arguments), dict(options)))

    run(case, keep, arch)
    return found


def run(case: Case, launcher: Any, arch: int, device: str = "cpu") -> None:
    """A case's forward and backward pass, every launch handed to `launcher`."""
    inputs = case.inputs(torch.device(device))
    with featkd.use_backend("triton"), redirect(launcher, arch):
        outputs = case.problem.featkd(inputs)
        backend = featkd.last_backend(case.problem.op)
        if backend != "triton":
            raise ValueError(f"{case.name}: runs on {backend}, not on Triton")
        if case.direction != "forward":
            leaves = [inputs[name] for name in case.problem.differentiable]
            upstream = [torch.ones_like(x) for x in outputs]
            torch.autograd.grad(outputs, leaves, upstream)


def compile_for(launch: Recorded, arch: int) -> Code:
    """Compile a launch's kernel for an architecture, and read the machine code."""
    compiled = compile_triton(launch.kernel, launch.arguments, arch, **launch.options)
    usage, sass = _machine_code(compiled.asm["cubin"])
    sizes = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert sizes is not None, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    products = re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass)
    tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    return Code(
        registers=int(sizes[1]),
        stack=int(sizes[2]),
        spills=count(r"\b(?:LDL|STL)\b"),
        shared=compiled.metadata.shared,
        products="tt.dot" in compiled.asm["ttir"],
        tensor_core=len(products),
        instructions=" ".join(sorted(set(products))),
        loads=count(r"\b(?:LDG|LDGSTS|UBLKCP|UTMALDG)\b"),
        wide_loads=count(r"\b(?:LDG|LDGSTS)\.E\S*\.128") + count(r"\b(?:UBLKCP|UTMALDG)\b"),
        doubles=count(r"\b(?:DADD|DMUL|DFMA|DSETP|DMMA|F2F\.F64)\b"),
        aligned=all(s * x.itemsize % 16 == 0 for x in tensors for s in x.stride()[:-1]),
    )


@lru_cache(maxsize=4)  # a case launches some kernels several times over
def _machine_code(binary: bytes) -> tuple[str, str]:
    """What a kernel uses, and its instructions."""
    usage = _tool("cuobjdump", "--dump-resource-usage", binary=binary)
    return usage, _tool("nvdisasm", "-c", binary=binary)


def _tool(name: str, option: str, binary: bytes) -> str:
    """Output of one of the CUDA tools that Triton carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout
