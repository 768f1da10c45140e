"""The solver run by teams of real threads: agreement with one thread, races, bad addresses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc" / "linalg"
CHECK = Path(__file__).with_name("check_teams.cpp")


def barriers(*headers: Path) -> list[int]:
    """The numbers in headers of csrc."""
    texts = "".join(path.read_text() for path in headers)
    return sorted(int(n) for n in re.findall(r"team\.barrier\(At<(\d+)>\(\)\)", texts))


BARRIERS = barriers(*CSRC.glob("*.h"))
JACOBI_BARRIERS = barriers(CSRC / "jacobi.h")
SPECTRUM_BARRIERS = [number for number in BARRIERS if number not in JACOBI_BARRIERS]
RACES = 66  # ThreadSanitizer's exit code


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"


def build(sanitizer: str, folder: Path) -> Path:
    target = folder / sanitizer
    command = [compiler(), "-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", "-Wno-psabi"]
    subprocess.run([*command, f"-I{CSRC}", str(CHECK), "-o", str(target), "-pthread"], check=True)
    return target


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("thread", tmp_path_factory.mktemp("tsan"))


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # address space randomisation beyond what ThreadSanitizer's shadow memory can follow
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), str(program), *arguments]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_barriers_are_numbered_apart():
    assert list(range(1, len(BARRIERS) + 1)) == BARRIERS


def test_teams_agree_with_one_thread_and_do_not_race(watched: Path):
    done = run(watched)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "0 differences"


@pytest.mark.parametrize("number", BARRIERS)
def test_a_dropped_barrier_is_found(watched: Path, number: int):
    done = run(watched, str(number))
    assert done.returncode == RACES, done.stdout
    assert "data race" in done.stderr


def test_no_bad_address(tmp_path: Path):
    done = run(build("address", tmp_path))
    assert done.returncode == 0, done.stderr
