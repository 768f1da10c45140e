"""The wheel holds what featkd needs at run time, and works without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
    *("featkd", "benchmarks", "kernels", "recipes"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "dist", "."]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = (copy / "dist").glob("*.whl")
    return found


def test_wheel_contents(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"featkd/recipes/{p.name}" for p in (ROOT / "recipes").glob("*.yaml")}
    expected |= {
        str(p.relative_to(ROOT)) for p in (ROOT / "featkd").rglob("*.py") if "tests" not in p.parts
    }
    for folder in ("kernels", "benchmarks"):
        expected |= {f"featkd/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
    expected |= {"featkd/py.typed", "featkd/demo/templates/report.html"}
    expected |= {f"featkd/ptx/runtime/{p.name}" for p in (ROOT / "featkd/ptx/runtime").iterdir()}
    assert expected <= names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/"))]


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import featkd, featkd.kernels.launch, featkd.benchmarks.cli\n"
        "from featkd.train.recipe import shipped_recipes\n"
        "print(featkd.__file__, *shipped_recipes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    place, *recipes = done.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    assert "widelast_imagenet_softkd_mse" in recipes
