"""Launches of the row kernels: recorded, compiled ahead of time, and timed on a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import featkd
from featkd.kernels.launch import Launcher, redirect
from ptx_emulator import compile_triton

from ..problem import Case


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

    @property
    def signature(self) -> tuple[object, ...]:
        """Properties of the launch on which the compiled code depends."""
        found: list[object] = [self.name, *self.options.items()]
        for parameter in self.kernel.params:
            x = self.arguments[parameter.name]
            if isinstance(x, torch.Tensor):
                found.append(x.dtype)
            elif parameter.is_constexpr or x is None:
                found.append(str(x))
            elif isinstance(x, int) and not parameter.do_not_specialize:
                found.append((x == 1, x % 16 == 0))
        return tuple(found)


@dataclass(frozen=True)
class Code:
    """Resources and instructions of a compiled kernel."""

    registers: int
    """Registers per thread."""
    stack: int
    """Bytes of stack per thread: spilled registers and arrays."""
    spills: int
    """Instructions that read or write local memory."""
    shared: int
    """Bytes of shared memory per block."""
    warps: int
    """Warps per block."""
    loads: int
    """Instructions that read global memory."""
    wide_loads: int
    """Instructions that read 16 bytes of global memory per thread."""
    doubles: int
    """Arithmetic instructions in float64."""
    aligned: bool
    """True if the rows of every tensor begin at multiples of 16 bytes, as 16-byte loads need."""


def record(case: Case) -> list[Recorded]:
    """Returns the launches of a case's forward and backward pass without running them.

    Raises:
        ValueError: the op does not run on Triton.
    """
    found: list[Recorded] = []

    def keep(kernel: Any, grid: tuple[int, ...], arguments: Any, options: Any) -> None:
        found.append(Recorded(kernel, grid, dict(arguments), dict(options)))

    run(case, keep)
    return found


def run(case: Case, launcher: Launcher, device: str = "cpu") -> None:
    """Runs a case's forward and backward pass, and hands every launch to `launcher`."""
    place = torch.device(device)
    inputs = case.inputs(place)
    with featkd.use_backend("triton"), redirect(launcher):
        with case.context(place):
            outputs = case.problem.featkd(inputs)
        backend = featkd.last_backend(case.problem.op)
        if backend != "triton":
            raise ValueError(f"{case.name}: expected to run on triton, ran on {backend}")
        if case.direction != "forward":
            leaves = [inputs[name] for name in case.problem.differentiable]
            upstream = [torch.ones_like(x) for x in outputs]
            torch.autograd.grad(outputs, leaves, upstream)


def compile_for(launch: Recorded, arch: int) -> Code:
    """Compiles a launch's kernel for an architecture, and reads the machine code."""
    compiled = compile_triton(launch.kernel, launch.arguments, arch, **launch.options)
    usage = _tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    sass = _tool("nvdisasm", "-c", compiled.asm["cubin"])
    sizes = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert sizes is not None, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    return Code(
        registers=int(sizes[1]),
        stack=int(sizes[2]),
        spills=count(r"\b(?:LDL|STL)\b"),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        loads=count(r"\bLDG\b"),
        wide_loads=count(r"\bLDG\.E\S*\.128"),
        doubles=count(r"\b(?:DADD|DMUL|DFMA|DSETP|DMMA|F2F\.F64)\b"),
        aligned=all(s * x.itemsize % 16 == 0 for x in tensors for s in x.stride()[:-1]),
    )


def _tool(name: str, option: str, binary: bytes) -> str:
    """Returns the output of a CUDA tool that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def on_gpu(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]
) -> float:
    """Returns the median microseconds of many launches, the cache flushed before each."""
    from triton.testing import do_bench

    median = do_bench(lambda: kernel[grid](**arguments, **options), return_mode="median")
    return 1e3 * float(median)


def measure(
    cases: Sequence[Case], device: str = "cuda", timer: Callable[..., float] = on_gpu
) -> list[tuple[str, float]]:
    """Times each launch of the cases' forward and backward passes: (case/kernel, microseconds).

    Args:
        timer: takes kernel, grid, arguments and options, runs the launch at least once and returns
            microseconds.
    """
    found: list[tuple[str, float]] = []
    for case in cases:

        def launcher(kernel: Any, *launch: Any, title: str = case.title) -> None:
            found.append((f"{title}/{kernel.fn.__name__}", timer(kernel, *launch)))

        run(case, launcher, device)
    return found
