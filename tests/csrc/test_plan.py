"""Launch configuration of the CUDA kernels, which is plain host code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.report.csrc_kernels import jacobi_bytes
from tests.csrc.test_teams import CSRC, compiler

SOURCE = """
#include <cstdio>
#include <cstdlib>
#include "jacobi.h"
#include "plan.h"
#include "thread_team.h"
using namespace featkd::portable;
int main(int count, char** a) {
  if (count == 2) {  // scratch bytes of a team that works on copies, for rows of this length
    const int length = std::atoi(a[1]);
    std::printf("%zu", JacobiScratch<ThreadTeam, double>::bytes(length, featkd::WARPS));
    return 0;
  }
  const auto plan = featkd::plan_launch(
      std::strtoull(a[1], nullptr, 10), std::strtoll(a[2], nullptr, 10),
      {std::strtoull(a[3], nullptr, 10), std::strtoull(a[4], nullptr, 10), std::atoi(a[5])});
  std::printf("%d %zu %zu", plan.blocks, plan.shared, plan.workspace);
}
"""
KIB = 1024
H100 = (227 * KIB, 228 * KIB, 132)
A100 = (163 * KIB, 164 * KIB, 108)


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SOURCE)
    command = [compiler(), "-std=c++20", "-Wno-psabi", f"-I{CSRC}", "plan.cpp", "-o", "plan"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "plan"


@pytest.mark.parametrize(
    ("scratch", "batch", "device", "blocks", "in_shared"),
    [
        (100 * KIB, 5000, H100, 2 * 132, True),  # two blocks fit, with CUDA's reserved bytes
        (100 * KIB, 5000, A100, 108, True),
        (113 * KIB, 5000, H100, 2 * 132, True),
        (114 * KIB, 5000, H100, 132, True),
        (227 * KIB, 5000, H100, 132, True),
        (227 * KIB + 1, 5000, H100, 2 * 132, False),
        (8 * KIB, 5000, H100, 8 * 132, True),  # limited by 2,048 threads
        (100 * KIB, 7, H100, 7, True),
        (300 * KIB, 7, H100, 7, False),
        (100 * KIB, 0, H100, 0, True),
        (100 * KIB, 2**40, H100, 2 * 132, True),
    ],
)
def test_launch_plans(planner: Path, scratch, batch, device, blocks, in_shared):
    found = [int(x) for x in run(planner, scratch, batch, *device).split()]
    assert found[:2] == [blocks, scratch if in_shared else 0]
    each = -(-scratch // 256) * 256
    assert found[2] == (0 if in_shared else each * blocks)


@pytest.mark.parametrize(
    ("length", "device", "blocks", "in_shared"),
    [
        (64, A100, 6 * 108, True),
        (224, A100, 108, True),  # for 196 rows
        (224, H100, 2 * 132, True),
        (416, A100, 108, True),
        (448, A100, 2 * 108, False),
        (512, H100, 132, True),
    ],
)
def test_jacobi_launch_plans(planner: Path, length, device, blocks, in_shared):
    scratch = int(run(planner, length))
    assert scratch == jacobi_bytes(length, 8)
    found = [int(x) for x in run(planner, scratch, 5000, *device).split()]
    assert found[:2] == [blocks, scratch if in_shared else 0]


def run(planner: Path, *words: int) -> str:
    command = [planner, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
