"""Run in a process of its own under TRITON_INTERPRET=1: an op's kernels themselves, in float64.

python -m tests.kernels.interpreted OP gradcheck
python -m tests.kernels.interpreted OP mutants

`tests.kernels.float64_OP` defines what is run: `worst(kernels)` is the largest relative error over
its problems of the kernels of a module, `gradcheck()` calls torch's through the public function,
and MUTANTS are (name, what stands in the kernels' source, what a slip would have put there).
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter

from featkd import kernels as package


def scan_once_a_kernel() -> None:
    """Triton's interpreter looks through triton.language at each call of a device function, for a
    third of the time here, and finds only what it has replaced for the kernel that calls it."""
    scan = interpreter._patch_builtin
    first: dict[int, str | None] = {}

    def patch(pkg: Any, *rest: Any) -> None:
        if id(pkg) not in first:
            first[id(pkg)] = next((n for n in dir(pkg) if is_builtin(getattr(pkg, n))), None)
        name = first[id(pkg)]
        if name is not None and is_builtin(getattr(pkg, name)):
            scan(pkg, *rest)

    interpreter._patch_builtin = patch


def gradcheck(op: str) -> None:
    """float64 against autograd, and torch's numerical gradients through the public function."""
    suite = importlib.import_module(f"tests.kernels.float64_{op}")
    found = suite.worst(importlib.import_module(f"featkd.kernels.{op}"))
    assert found < 1e-13, found
    suite.gradcheck()
    print("gradcheck passed")


def mutants(op: str) -> None:
    """Prints each mutant's largest error over the problems: a slip that stays small is not seen."""
    suite = importlib.import_module(f"tests.kernels.float64_{op}")
    folder = Path(tempfile.mkdtemp())
    sys.path.insert(0, str(folder))
    source = Path(next(iter(package.__path__)))
    for i, (name, there, slip) in enumerate([("none", "", ""), *suite.MUTANTS]):
        copy = folder / f"mutant{i}"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        texts = {path: path.read_text() for path in copy.glob("*.py")}
        assert any(there in text for text in texts.values()), f"{name}: not in the kernels"
        for path, text in texts.items():
            slipped = text.replace(there, slip) if there else text
            path.write_text(slipped.replace("featkd.kernels", copy.name))
        kernels = importlib.import_module(f"{copy.name}.{op}")
        print(f"{name}\t{suite.worst(kernels):.3e}", flush=True)


if __name__ == "__main__":
    scan_once_a_kernel()
    {"gradcheck": gradcheck, "mutants": mutants}[sys.argv[2]](sys.argv[1])
