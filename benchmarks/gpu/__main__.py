"""The command: runs the parts and writes the results."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import facts, page, schedule

NO_GPU = 2


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 if all parts passed, 1 if something failed, 2 without a GPU or a usable torch."""
    names = [part.name for wave in schedule.WAVES for part in wave]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Runs the checks and measurements for a GPU.",
    )
    parser.add_argument("--out", type=Path, default=facts.ROOT / "gpu-results", help="folder")
    parser.add_argument("--cpu-parts", action="store_true", help="run small cases on the CPU")
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="run only these parts")
    parser.add_argument(
        "--into",
        nargs=2,
        type=Path,
        metavar=("PAGE.md", "FILE.json"),
        help=f"only write a run's tables between a page's marks '<!-- bench {page.MARK} -->'",
    )
    options = parser.parse_args(words)
    if options.into:
        page.write_into(*options.into)
        return 0
    found = facts.look()
    found["carry"] = facts.carry(found["missing"])
    for line in found["carry"]:
        print(f"missing: {line}")
    if "torch_error" in found or "torch" in found["missing"]:
        why = found.get("torch_error", "no torch")
        problem = f"{sys.executable}: no usable torch: {why}. Set GPU_PYTHON=..."
    elif not found["gpus"] and not options.cpu_parts:
        problem = (
            f"no CUDA device is visible to torch {found['torch']} of {sys.executable}: nothing was "
            "run. Use a machine with a GPU (see GPU_PYTHON, CUDA_VISIBLE_DEVICES), or --cpu-parts"
        )
    else:
        problem = facts.link()
    if problem:
        print(problem, file=sys.stderr)
        return NO_GPU
    device = "cpu" if options.cpu_parts else "cuda"
    gpus = found["gpus"] = [] if options.cpu_parts else found["gpus"]
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpus[0][0] if gpus else "cpu").strip("-").lower()
    print(page.origin(found), flush=True)
    waves = schedule.CPU_WAVES if options.cpu_parts else schedule.WAVES
    with tempfile.TemporaryDirectory(prefix="featkd-gpu-") as folder:
        outcomes = schedule.run(waves, device, Path(folder), gpus, options.only)
    for path in page.write(options.out, name, page.content(found, outcomes)):
        print(f"wrote {path}")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
