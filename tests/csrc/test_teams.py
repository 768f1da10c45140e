"""Solvers with teams of threads: agreement with one thread, races, bad addresses."""

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
    """Barrier numbers in headers of csrc."""
    texts = "".join(path.read_text() for path in headers)
    return sorted(int(n) for n in re.findall(r"team\.barrier\(\s*At<(\d+)>\(\)\)", texts))


BARRIERS = barriers(*CSRC.glob("*.h"))
JACOBI_BARRIERS = barriers(CSRC / "jacobi.h")
SPECTRUM_BARRIERS = [number for number in BARRIERS if number not in JACOBI_BARRIERS]
RACES = 66  # ThreadSanitizer's exit code


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"


def build(sanitizer: str, folder: Path) -> Path:
    """Compiles the checks without optimisation, which would take longer than it saves."""
    target = folder / sanitizer
    command = [compiler(), "-std=c++20", "-O0", f"-fsanitize={sanitizer}", "-Wno-psabi"]
    subprocess.run([*command, f"-I{CSRC}", str(CHECK), "-o", str(target), "-pthread"], check=True)
    return target


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("thread", tmp_path_factory.mktemp("tsan"))


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer's shadow memory does not cover all randomized addresses
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), str(program), *arguments]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_barrier_numbers_are_unique_and_consecutive():
    assert list(range(1, len(BARRIERS) + 1)) == BARRIERS


def test_thread_teams_match_single_thread_without_races(watched: Path):
    done = run(watched)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "0 differences"


@pytest.mark.parametrize("number", BARRIERS)
def test_skipped_barrier_is_reported(watched: Path, number: int):
    done = run(watched, str(number))
    assert done.returncode == RACES, done.stdout
    assert "data race" in done.stderr


def test_address_sanitizer_reports_nothing(tmp_path: Path):
    done = run(build("address", tmp_path))
    assert done.returncode == 0, done.stderr
