"""The wheel contains all that featkd needs at run time, and works without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import featkd

ROOT = Path(__file__).parent.parent
SOURCES = (
    *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
    *("featkd", "benchmarks", "csrc", "kernels", "recipes"),
)


# The tests run almost none of csrc, and optimised code takes six times as long to compile.
COMPILER = '#!/bin/sh\nexec {0} "$@" -O0\n'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a wheel was built: a copy, so that the checkout gets no build folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            built = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, copy / name, ignore=built)
        else:
            shutil.copy(source, copy)
    # `make env` builds in an isolated environment
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    build += ["-w", "dist", "."]
    compiler = copy / "compiler"
    compiler.write_text(COMPILER.format(os.environ.get("CXX", "c++")))
    compiler.chmod(0o700)
    known = {**os.environ, "CXX": str(compiler), "FEATKD_CUDA": "0"}  # much faster
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    return copy


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = (built / "dist").glob("*.whl")
    return found


def test_wheel_contents(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"featkd/recipes/{p.name}" for p in (ROOT / "recipes").glob("*.yaml")}
    expected |= {
        str(p.relative_to(ROOT)) for p in (ROOT / "featkd").rglob("*.py") if "tests" not in p.parts
    }
    for folder in ("kernels", "benchmarks"):
        expected |= {f"featkd/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
    expected |= {"featkd/py.typed", "featkd/compare/templates/report.html"}
    expected |= {"featkd/models/templates/model_card.md", "featkd/runtime/templates/page.html"}
    assert expected <= names
    assert "featkd/_csrc.so" in names
    assert wheel.name.startswith(f"featkd-{featkd.__version__}-py3-none-linux_")
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "tools/"))]
    assert not [n for n in names if "ptx_emulator" in n]


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import featkd, featkd.kernels.launch, featkd.cli.bench\n"
        "from featkd.train.recipe_file import shipped_recipes\n"
        "import torch; from featkd import linalg\n"
        "assert linalg.energy_ranks(torch.eye(10)).tolist() == [8, 9, 10, 10]\n"
        "assert featkd.last_backend('spectrum') == 'cpu'\n"
        "print(featkd.__file__, *shipped_recipes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    place, *recipes = done.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    assert "widelast_imagenet_softkd_mse" in recipes


def functions() -> dict[str, Any]:
    """Functions of setup.py, without running setup."""
    code = (ROOT / "setup.py").read_text().split("extensions = ")[0]
    names: dict[str, Any] = {"__name__": "setup"}
    exec(compile(code, "setup.py", "exec"), names)
    return names


def test_cuda_is_built_if_nvcc_is_found_and_allowed(monkeypatch, capsys):
    names = functions()
    monkeypatch.setenv("FEATKD_CUDA", "0")
    assert names["nvcc"]() is None
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("FEATKD_CUDA", "")
    assert names["nvcc"]() is None
    assert capsys.readouterr().err == "featkd: the CUDA half of csrc is not built (no nvcc found)\n"
    for value, message in (("1", "there is no nvcc"), ("yes", "expected 0, 1 or nothing")):
        monkeypatch.setenv("FEATKD_CUDA", value)
        with pytest.raises(SystemExit, match=message):
            names["nvcc"]()


def test_gencode_flags():
    gencodes = functions()["gencodes"]
    assert gencodes("8.0;9.0a 10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        gencodes("Hopper")


@pytest.mark.parametrize(("file", "name"), [("cpu_isa", "cpu"), ("heads", "mix_heads")])
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_instruction_set_objects_share_no_weak_symbol(built: Path, isa: str, file: str, name: str):
    """The linker would keep one copy of a shared symbol, perhaps compiled for AVX-512.

    Without optimisation there are all the more of them.
    """
    if isa not in functions()["ISAS"] or shutil.which("nm") is None:
        pytest.skip("another processor, or no nm")
    (target,) = (built / "build").rglob(f"{file}_{isa}.o")
    table = subprocess.run(["nm", str(target)], check=True, capture_output=True, text=True).stdout
    assert f"{name}_{isa}" in table
    weak = {line.split()[-1] for line in table.splitlines() if line.split()[-2] in "VWvwu"}
    # the namespace of an instruction set is part of its names
    assert [x for x in weak if isa not in x] == []


def test_one_version_everywhere():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{featkd.__version__}"' in pyproject
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == featkd.__version__
    assert f"\n## {featkd.__version__}" in (ROOT / "CHANGELOG.md").read_text()
