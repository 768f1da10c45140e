"""Part: compute-sanitizer's memcheck and racecheck on a small case of each op.

The tool instruments featkd's kernels alone (`--kernel-name`). A kernel that writes past its tensor
is the control: it must be reported, or the filter or the tool misses kernels.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from tests.gpu import accuracy
from tests.gpu.forms import FORMS, MAIN, Sizes

from . import facts, schedule
from .recorder import Cut, NotHere, Recorder

TOOLS = ("memcheck", "racecheck")
CSRC = ("linalg/spectrum", "linalg/jacobi")
CONTROL = "control"
# searched for in a kernel's name; csrc's kernels and the control begin with featkd_
KERNELS = "distance_|two_norms_|soft_kd_|sum_partials|featkd_"
_START_UP = 20  # seconds of the part's limit that its own imports may take
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def checks(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Runs an item for each op and tool; each gets an even share of the time that is left."""
    items = [("memcheck", CONTROL), *((tool, name) for tool in TOOLS for name in (*MAIN, *CSRC))]
    if device.type == "cpu":
        items = [("none", MAIN[1])]
    (part,) = (x for wave in schedule.WAVES for x in wave if x.name == "sanitizer")
    end = time.monotonic() + part.limit - _START_UP
    mine = items[shard::shards]
    for number, (tool, name) in enumerate(mine):
        limit = max(0.0, end - time.monotonic()) / (len(mine) - number)
        recorder.run(f"{tool}/{name}", partial(check, name, tool, device, limit))


def command_of(name: str, tool: str, device: torch.device, limit: float) -> list[str]:
    """Returns the command that runs a case under a tool.

    Raises:
        NotHere: compute-sanitizer is not installed.
    """
    case = [sys.executable, "-m", "benchmarks.gpu.sanitizer", name, device.type, f"{limit:.0f}"]
    if tool == "none":
        return case
    path = facts.cuda_tool("compute-sanitizer")
    if path is None:
        raise NotHere("compute-sanitizer is neither on the path nor in CUDA_HOME")
    # torch asks the driver for functions that it may lack, which is no error
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [
        *(path, "--tool", tool, "--print-limit", "20", *quiet),
        *("--kernel-name", f"regex={KERNELS}"),
        *("--target-processes", "application-only"),  # Triton starts compilers
        *case,
    ]


def check(name: str, tool: str, device: torch.device, limit: float) -> None:
    """Runs a case under a tool for at most `limit` seconds and reads the tool's summary.

    Raises:
        Cut: the time was over before the tool's summary.
        NotHere: compute-sanitizer is not installed.
        AssertionError: the tool reports an error, or the case or the tool failed.
    """
    command = command_of(name, tool, device, limit)
    # one allocation per tensor: accesses beyond its end are found
    known = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile() as file:  # a process left over would keep a pipe open
        with subprocess.Popen(command, env=known, stdout=file, stderr=file) as process:
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                alone = " ".join(command_of(name, tool, device, 3600))
                raise Cut(
                    f"cut after {limit:.1f} s, its share of the part's time: neither passed nor "
                    f"failed. To see its result, run {alone}"
                ) from None
        file.seek(0)
        output = file.read().decode(errors="replace")
    print(output[-20_000:])
    judge(name, tool, code, output)


def judge(name: str, tool: str, code: int, output: str) -> None:
    """Raises AssertionError unless the output shows what the case must show."""
    counts = [int(count) for count in _SUMMARY.findall(output)]
    if name == CONTROL:
        assert counts, f"{tool} gave no summary: {output[-600:]}"
        assert any(counts), f"{tool} missed a write past a tensor: its other results mean nothing"
        return
    assert code == 0, f"exit code {code}: {output[-600:]}"
    assert "the case ran" in output, output[-600:]
    if tool != "none":
        reports = "\n".join(line for line in output.splitlines() if "=========" in line)
        assert counts, f"{tool} gave no summary: {output[-600:]}"
        assert not any(counts), f"{tool}: {reports[:1500]}"


@triton.jit  # type: ignore[untyped-decorator]
def featkd_write_past_the_end(out, ELEMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out + tl.arange(0, ELEMENTS), 1.0)


def main(words: Sequence[str]) -> int:
    """Runs the forward and backward pass of a case, with or without a sanitizer."""
    name, kind, limit = words
    # if the tool is killed and leaves the case behind, the case ends itself
    signal.alarm(max(1, int(limit)))
    device = torch.device(kind)
    if name == CONTROL:
        featkd_write_past_the_end[(1,)](torch.zeros(8, device=device), 1024)
    elif name in CSRC:
        from featkd import linalg

        x = torch.randn(3, 17, 40, device=device)
        if name.endswith("jacobi"):
            linalg.svd(x.double(), method="jacobi")
        else:
            linalg.energy_ranks(x)
            linalg.svdvals(x)
    else:
        form = FORMS[name]
        small = Sizes(5, (1, 1), 70, 70) if form.op == "soft_kd" else Sizes(2, (3, 5), 24, 72)
        precision = accuracy.PRECISIONS["autocast-bf16"]
        tensors = accuracy.inputs_of(form, small, precision, device)
        accuracy.run_ours(form, tensors, small, precision)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("the case ran")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
