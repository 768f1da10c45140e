"""Part: compute-sanitizer's memcheck and racecheck on a small case of each op."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial

import torch

from tests.gpu import accuracy
from tests.gpu.forms import FORMS, MAIN, Sizes

from .recorder import NotHere, Recorder

TOOLS = ("memcheck", "racecheck")
CSRC = ("linalg/spectrum", "linalg/jacobi")
_SECONDS = 150
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def checks(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Runs an item for each op and tool."""
    items = [(name, tool) for tool in TOOLS for name in (*MAIN, *CSRC)]
    if device.type == "cpu":
        items = [(MAIN[1], "none")]
    for number, (name, tool) in enumerate(items):
        if number % shards == shard:
            recorder.run(f"{tool}/{name}", partial(_check, name, tool, device))


def _check(name: str, tool: str, device: torch.device) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.sanitizer", name, device.type]
    if tool != "none":
        path = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
        )
        if path is None:
            raise NotHere("compute-sanitizer is neither on the path nor in CUDA_HOME")
        # torch asks the driver for functions that it may lack, which is no error
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [path, "--tool", tool, "--print-limit", "20", *quiet, *command]
    # one allocation per tensor: accesses beyond its end are found
    known = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile() as file:  # a process left over would keep a pipe open
        with subprocess.Popen(command, env=known, stdout=file, stderr=file) as process:
            try:
                code = process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        file.seek(0)
        output = file.read().decode(errors="replace")
    print(output[-20_000:])
    assert code == 0, f"exit code {code}: {output[-600:]}"
    assert "the case ran" in output, output[-600:]
    if tool != "none":
        counts = _SUMMARY.findall(output)
        # the lines name the kernel, which may be one of cuBLAS
        reports = "\n".join(line for line in output.splitlines() if "=========" in line)
        assert counts, f"{tool} gave no summary: {output[-600:]}"
        assert not any(map(int, counts)), f"{tool}: {reports[:1500]}"


def main(words: Sequence[str]) -> int:
    """Runs the forward and backward pass of a case, with or without a sanitizer."""
    name, kind = words
    device = torch.device(kind)
    if name in CSRC:
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
