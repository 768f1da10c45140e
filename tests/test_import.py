"""Importing featkd is fast, and imports between its layers only go down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import featkd

PACKAGE = Path(featkd.__file__).parent
ROOT = Path(__file__).parent.parent

# highest first; a module may import from its own row and from the rows below it
LAYERS = (
    ("__main__",),
    ("cli", "demo", "benchmarks"),
    ("compare",),
    ("train", "diagnostics"),
    ("evaluation",),
    ("cache",),
    ("models", "data"),
    ("losses", "functional", "linalg"),
    ("ops",),
    ("kernels",),
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


def test_losses_are_quick_after_torch_and_models_load_nothing_after_timm():
    code = """
import time, sys, torch
start = time.perf_counter()
import featkd.losses
print(time.perf_counter() - start, "timm" in sys.modules, "nvidia.dali" in sys.modules)
import timm, safetensors.torch
before = {name.partition(".")[0] for name in sys.modules}
import featkd.models
after = {name.partition(".")[0] for name in sys.modules}
print(*after - before - set(sys.stdlib_module_names))
print(torch.cuda.is_initialized())
"""
    first, new, initialized = run(code).splitlines()
    seconds, *loaded = first.split()
    assert float(seconds) < 2
    assert loaded == ["False", "False"]
    assert (new, initialized) == ("", "False")


def test_lazy_submodules():
    assert "functional" in dir(featkd)
    assert featkd.functional.projected_feature_kd is not None
    with pytest.raises(AttributeError, match="no attribute 'functionall'"):
        featkd.functionall  # noqa: B018


def row(module: str) -> int:
    return next(n for n, names in enumerate(LAYERS) if module in names)


def imported(path: Path) -> list[str]:
    """Returns the full names that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # mypy knows benchmarks/ by that name alone
            assert (path.parent.name, node.level) == ("benchmarks", 1), f"relative: {path}"
            found.append("featkd.benchmarks")
    return found


def imports_of(path: Path) -> set[str]:
    """Returns the folders and modules below featkd that a file imports."""
    below = {name.split(".")[1] for name in imported(path) if name.startswith("featkd.")}
    return {
        name for name in below if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    }


def modules() -> dict[Path, str]:
    """Maps each source file to the folder or module below featkd that contains it."""
    inside = sorted(PACKAGE.rglob("*.py"))
    found = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in inside}
    for name in ("kernels", "benchmarks"):  # beside the package: featkd.kernels and so on
        found |= dict.fromkeys(sorted((PACKAGE.parent / name).glob("*.py")), name)
    return found


@pytest.mark.parametrize(("path", "module"), modules().items(), ids=lambda x: Path(x).stem)
def test_imports_only_go_down(path, module):
    for imported in imports_of(path):
        assert row(imported) >= row(module), f"{path} imports featkd.{imported}"


def uses(path: Path, name: str) -> bool:
    """Checks if a file imports a package."""
    return any(found.split(".")[0] == name for found in imported(path))


def test_the_ptx_emulator_is_independent_of_featkd():
    files = [*(ROOT / "tools/ptx_emulator").rglob("*.py")]
    assert len(files) > 30
    assert not [path for path in files if uses(path, "featkd") or uses(path, "benchmarks")]


def test_featkd_does_not_import_the_ptx_emulator():
    assert not [path for path in modules() if uses(path, "ptx_emulator")]
