"""Importing featkd is light, and imports between its layers only go down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import featkd

PACKAGE = Path(featkd.__file__).parent

# highest first; a module may import from its own row and from the rows below it
LAYERS = (
    ("__main__",),
    ("cli", "demo", "benchmarks"),
    ("train", "diagnostics"),
    ("cache",),
    ("models", "data"),
    ("losses", "functional", "linalg"),
    ("ops",),
    ("kernels",),
    ("ptx",),  # a test bench: only benchmarks imports it
    ("runtime", "recipes", "__init__"),
)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_nothing_heavy():
    heavy = "('torch', 'timm', 'triton', 'nvidia.dali', 'matplotlib', 'sklearn', 'jsonargparse')"
    out = run(f"import sys, featkd; print([m for m in {heavy} if m in sys.modules])")
    assert out.strip() == "[]"


def test_functions_and_losses_take_under_two_seconds_after_torch():
    out = run(
        "import time, sys, torch; t = time.perf_counter(); import featkd.losses; "
        "s = time.perf_counter() - t; "
        "print(s, torch.cuda.is_initialized(), 'timm' in sys.modules, 'nvidia.dali' in sys.modules)"
    )
    seconds, *loaded = out.split()
    assert float(seconds) < 2
    assert loaded == ["False", "False", "False"]


def test_lazy_submodules():
    assert "functional" in dir(featkd)
    assert featkd.functional.projected_feature_kd is not None
    with pytest.raises(AttributeError, match="no attribute 'functionall'"):
        featkd.functionall  # noqa: B018


def row(module: str) -> int:
    return next(n for n, names in enumerate(LAYERS) if module in names)


def imports_of(path: Path) -> set[str]:
    """First names below featkd that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = node.module.split(".")
            if parts == ["featkd"]:
                found |= {alias.name for alias in node.names if (PACKAGE / alias.name).is_dir()}
                found |= {a.name for a in node.names if (PACKAGE / f"{a.name}.py").is_file()}
            elif parts[0] == "featkd":
                found.add(parts[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("featkd.")}
        elif isinstance(node, ast.ImportFrom):  # mypy knows benchmarks/ by that name alone
            assert (path.parent.name, node.level) == ("benchmarks", 1), f"relative: {path}"
            found.add("benchmarks")
    return found


def modules() -> dict[Path, str]:
    """Every source file and the first name below featkd that it belongs to."""
    inside = sorted(PACKAGE.rglob("*.py"))
    found = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in inside}
    for name in ("kernels", "benchmarks"):  # beside the package: featkd.kernels and so on
        found |= dict.fromkeys(sorted((PACKAGE.parent / name).glob("*.py")), name)
    return found


@pytest.mark.parametrize(("path", "module"), modules().items(), ids=lambda x: Path(x).stem)
def test_imports_only_go_down(path, module):
    for imported in imports_of(path):
        assert row(imported) >= row(module), f"{path} imports featkd.{imported}"


def test_the_test_bench_needs_only_the_lowest_layer():
    found = set().union(*(imports_of(path) for path in (PACKAGE / "ptx").rglob("*.py")))
    assert found <= {"ptx", *LAYERS[-2], *LAYERS[-1]}


def test_only_benchmarks_import_the_test_bench():
    users = {module for path, module in modules().items() if "ptx" in imports_of(path)}
    assert users <= {"ptx", "benchmarks"}
