"""featkd on a CPU beside eager torch and both compiled forms, on an idle and on a busy machine.

python -m featkd.benchmarks.cpu_ratios [--min-seconds 1] [--batch 32] [--json FILE]

Each setting has a process of its own: OMP_WAIT_POLICY active, passive, and both beside one process
that keeps a core busy. Two threads; 196 tokens, 192 to 384 channels; forward and backward. Ratios
are the other variant's time / featkd's, medians of rounds in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_THREADS = "2"
# setting -> OMP_WAIT_POLICY, and whether another process runs beside
SETTINGS = {
    "active": ("active", False),
    "passive": ("passive", False),
    "active, busy": ("active", True),
    "passive, busy": ("passive", True),
}
_DTYPES = ("fp32", "bf16")


def measure(batch: int, min_seconds: float) -> Iterator[tuple[str, dict[str, float]]]:
    """Each case's name and milliseconds: of the variants, and "speedup" of eager's time / each."""
    import torch

    from . import cases, timing, variants
    from .problem import Case, Maps

    maps = Maps(batch, (14, 14), 192, 384)
    device = torch.device("cpu")
    problems = [p for op in cases.ROW_OPS for p in cases.problems_of(op, maps, ((batch, 1000),))]
    for problem in problems:
        for dtype in _DTYPES:
            case = Case(problem, dtype, "both")
            prepared = variants.prepare(case, variants.VARIANTS, device)
            clock = timing.clock_for(device)
            times = timing.take_turns(prepared.steps, clock, min_seconds=min_seconds)
            ours = times["featkd"]
            found = {f"{name} ms": 1e3 * timing.quantiles(x)[1] for name, x in times.items()}
            for name, x in times.items():
                if name != "featkd":
                    found[f"{name} / featkd"] = timing.speedup(x, ours)
            yield case.name, found


@contextmanager
def _beside(busy: bool) -> Iterator[None]:
    """A process that does nothing but compute, while the block runs."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def main() -> None:
    """Run every setting, and print a table of each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--min-seconds", type=float, default=1.0, help="for each variant of a case")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    parser.add_argument("--inside", choices=SETTINGS, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        for name, found in measure(options.batch, options.min_seconds):
            print(json.dumps([name, found]), flush=True)
        return
    everything: dict[str, dict[str, dict[str, float]]] = {}
    for setting, (policy, busy) in SETTINGS.items():
        print(f"{setting}: OMP_WAIT_POLICY={policy}, {_THREADS} threads", flush=True)
        command = [sys.executable, "-m", __spec__.name, "--inside", setting]
        command += ["--batch", str(options.batch), "--min-seconds", str(options.min_seconds)]
        environment = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": _THREADS}
        everything[setting] = {}
        with (
            _beside(busy),
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as work,
        ):
            assert work.stdout is not None
            for line in work.stdout:
                name, found = json.loads(line)
                everything[setting][name] = found
                cells = [f"{key} {value:.3g}" for key, value in found.items()]
                print(f"  {name}: {', '.join(cells)}", flush=True)
        if work.returncode:
            sys.exit(f"{setting}: the process ended with {work.returncode}")
    if options.json is not None:
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    for setting, cases in everything.items():
        lowest = min(cases, key=lambda name: cases[name]["eager / featkd"])
        spectral = [x["eager / featkd"] for name, x in cases.items() if "spectral" in name]
        least = cases[lowest]["eager / featkd"]
        print(f"{setting}: eager's time / featkd's at least {least:.2f} ({lowest}),", end=" ")
        print(f"spectral {min(spectral):.2f}")


if __name__ == "__main__":
    main()
