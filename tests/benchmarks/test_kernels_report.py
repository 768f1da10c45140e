"""The report of the compiled kernels: planted faults are found, figures are as by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import cases
from benchmarks.problem import DTYPES
from benchmarks.report import aot, compiled, host, modelled, traffic
from benchmarks.report.__main__ import main
from benchmarks.report.chips import CHIPS
from ptx_emulator import run_triton

ARCHS = tuple(CHIPS)
ROWS = 4 * 196
MAP = ROWS * 384 * 2  # bytes in bf16


@pytest.fixture(scope="module", autouse=True)
def cache(compiled_kernels):
    """Compiled kernels are kept in the test run's own folder."""


@triton.jit
def copy(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at))


@triton.jit
def strided(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + 3 * at))


@triton.jit
def in_double(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, (tl.load(source + at).to(tl.float64) * 1.1).to(tl.float32))


@triton.jit
def mixed_tile(source, target, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(source + at)
    for _ in range(4):
        x = x * tl.sum(x, 0)[None, :] + tl.trans(x) * tl.max(x, 1)[:, None]
    tl.store(target + at, x)


def build(kernel, size: int, arch: int = 80, **options: int) -> compiled.Compiled:
    arguments = {"source": torch.zeros(size * size), "target": torch.zeros(size * size), "N": size}
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False, **options}
    launch = aot.Recorded(kernel, (1,), arguments, options)
    return compiled.Compiled("case", launch.name, arch, aot.compile_for(launch, arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_good_kernel_breaks_no_rule(arch):
    good = build(copy, 128, arch)
    assert good.broken == []
    assert good.blocks == 32  # one warp per block, and few registers


@pytest.mark.parametrize(
    ("kernel", "size", "options", "rule"),
    [
        (strided, 128, {}, "no 16-byte load"),
        (in_double, 128, {}, "float64 instructions"),
        (mixed_tile, 128, {}, "bytes of stack"),
        # the bound on registers is too high for 1,024 threads
        (mixed_tile, 256, {"num_warps": 32, "maxnreg": 128}, "131072 registers per block"),
    ],
    ids=["scalar loads", "double", "stack", "registers"],
)
def test_planted_faults_are_found(kernel, size, options, rule):
    broken = build(kernel, size, **options).broken
    assert any(rule in text for text in broken), broken


CODE = aot.Code(
    registers=64,
    stack=0,
    spills=0,
    shared=0,
    warps=4,
    loads=1,
    wide_loads=1,
    doubles=0,
    aligned=True,
)


@pytest.mark.parametrize(
    ("kernel", "changes", "arch", "broken"),
    [
        ("kernel", {"stack": 32}, 80, ""),
        ("kernel", {"stack": 40}, 80, "40 bytes of stack"),
        ("kernel", {"wide_loads": 0}, 80, "no 16-byte load"),
        ("kernel", {"wide_loads": 0, "aligned": False}, 80, ""),
        ("sum_partials", {"wide_loads": 0}, 80, ""),  # reads no rows
        ("kernel", {"shared": 204800}, 80, "204800 bytes of shared memory, A100 has 166912"),
        ("kernel", {"shared": 204800}, 90, ""),
        ("kernel", {"registers": 64, "warps": 32}, 80, ""),
        (
            "kernel",
            {"registers": 65, "warps": 32},
            80,
            "73728 registers per block, more than 65536",
        ),
    ],
)
def test_rules(kernel, changes, arch, broken):
    found = compiled.Compiled("case", kernel, arch, replace(CODE, **changes)).broken
    assert found == ([broken] if broken else [])


def test_blocks_of_a_processor():
    """The limits are registers, shared memory, warps and blocks."""
    a100, h100 = CHIPS[80], CHIPS[90]
    assert a100.blocks(128, 4, 0) == 4
    assert a100.blocks(129, 4, 0) == 3
    assert a100.blocks(16, 4, 0) == 16
    assert a100.blocks(16, 1, 0) == 32
    assert (a100.blocks(16, 4, 81 * 1024), h100.blocks(16, 4, 81 * 1024)) == (2, 2)
    assert (a100.blocks(16, 4, 54 * 1024), h100.blocks(16, 4, 54 * 1024)) == (2, 4)


def test_every_row_kernel_pair_and_chip_is_compiled_once():
    jobs = compiled.default_jobs(cases.ROW_OPS, tuple(DTYPES), ARCHS)
    assert 100 <= len(jobs) <= 160
    found = {}
    for question, number, arch in jobs:
        launch = compiled._recorded(question)[number]
        assert found.setdefault((launch.signature, arch), question) == question
        found.setdefault((launch.name, question.dtype, arch), question)
    rows = ("distance_forward", "distance_backward", "two_norms_forward", "two_norms_backward")
    assert {(name, dtype, arch) for name in rows for dtype in DTYPES for arch in ARCHS} <= {*found}
    shapes = {question.case.problem.shape for question, _, _ in jobs}
    assert {"1x196x768to1024", "1x256x1024to1280", "1x1369x384to1024"} <= shapes


@pytest.mark.parametrize(("form", "forward", "backward"), [("mse", 2, 3), ("two-norms", 3, 4)])
def test_traffic_is_that_of_the_rows(form, forward, backward):
    """Counted and added up, an op moves its rows and little else."""
    rows = traffic.Rows(form, "bf16", 4, processors=3)
    found = traffic.count(rows)
    assert [x.direction for x in found] == ["forward", "backward"]
    assert [x.floor for x in found] == [forward * MAP, backward * MAP]
    limits = {"forward": 1.05, "backward": 1.1}
    assert all(1 < x.over_floor < limits[x.direction] and not x.broken for x in found)
    for counted, added in zip(found, traffic.add_up(rows), strict=True):
        assert (counted.floor, counted.counted, added.counted) == (added.floor, True, False)
        assert counted.moved == pytest.approx(added.moved, rel=0.002)


def test_partial_sums_follow_the_processors():
    """Sums of the parameters' gradients, (programs, 2, C) in float32, are written and read."""
    moved = [
        traffic.add_up(traffic.Rows("mse", "bf16", 4, processors=n))[1].moved for n in (2, 4, 8)
    ]
    each = 2 * 2 * 384 * 4  # written and read, two parameters
    assert moved[1] - moved[0] == 4 * (4 - 2) * each  # four programs per multiprocessor
    assert moved[2] - moved[1] == 4 * (8 - 4) * each


def test_broken_traffic_rules_are_named():
    rows = traffic.Rows("mse", "bf16", 4)
    good = traffic.Traffic(rows, "forward", 104, 100, counted=True)
    assert good.broken == []
    assert replace(good, moved=106).broken == ["moves 1.060 x the floor, more than 1.05"]
    assert replace(good, moved=106, direction="backward").broken == []
    assert replace(good, moved=106, counted=False).broken == []


def test_launches_of_an_op():
    """One row kernel per direction, one reduction, the products, and nothing else."""
    (case,) = (
        c
        for c in cases.select(["lift_head"], "small", ["bf16"], ["both"])
        if c.problem.form == "spectral"
    )
    forward, backward = host.count(case)
    assert forward.kernels == ("distance_forward", "sum_partials")
    assert backward.kernels == ("distance_backward", "sum_partials")
    assert (forward.products, backward.products) == (1, 2)
    assert (forward.others, backward.others) == ({}, {})
    mixed = host.count(replace(case, dtype="autocast-bf16"))
    # autocast casts student and weight, and their gradients
    assert [x.others for x in mixed] == [{"copy_": 2}, {"copy_": 2}]


def test_host_times_come_in_pairs():
    found = host.measure(rounds=3)
    assert {x.name.partition("/")[0] for x in found} == set(cases.ROW_OPS)
    assert all(x.us > 0 and x.plain_us > 0 for x in found)
    (text,) = host.HostTime("op", 201, 100).broken
    assert text == "2.01 times plain torch's host time, more than 2"
    assert host.HostTime("op", 199, 100).broken == []


def test_modelled_time_of_the_plain_mse():
    """Every pass takes its bytes at 4 TB/s."""
    found = {(case, form): us for case, _, form, _, us in modelled.model()}
    mse = "projected_feature_kd/mse-widelast/256x196x384to384/bf16"
    map_us = 256 * 196 * 384 * 2 / 4e6
    assert found[mse, "eager"] == pytest.approx(7 * map_us, rel=1e-3)  # 4 forward, 3 backward
    assert found[mse, "compiled"] == pytest.approx(5 * map_us, rel=1e-3)
    assert found[mse, "featkd"] == found[mse, "compiled"]
    lift = "projected_feature_kd/mse-lift/256x196x192to384/bf16"
    product_us = 256 * 196 * (192 + 384) * 2 / 4e6  # and W, which is small
    assert found[lift, "featkd"] == pytest.approx(3 * product_us + 5 * map_us, rel=0.05)
    assert found[lift, "featkd"] < found[lift, "compiled"] < found[lift, "eager"]


def test_every_launch_is_timed():
    def timer(kernel, grid, arguments, options):
        run_triton(kernel, grid, check=False, **arguments, **options)
        return 2.5

    (case,) = cases.select(["soft_kd"], "small", ["fp32"], ["both"])[:1]
    timed = aot.measure([case], "cpu", timer)
    kernels = ("soft_kd_rows", "sum_partials", "soft_kd_rows")
    assert timed == [(f"soft_kd/indices/4x1000/fp32/{kernel}", 2.5) for kernel in kernels]


def test_command_prints_and_writes_the_figures(tmp_path, capsys):
    file = tmp_path / "report.json"
    words = ["--ops", "soft_kd", "--dtypes", "fp32", "--archs", "90", "--json", str(file)]
    assert main([*words, "--parts", "compiled", "modelled"]) == 0
    printed = capsys.readouterr().out
    assert "3 kernels compiled" in printed
    assert "0 broken rules" in printed
    assert "modelled for an H200, not measured" in printed
    content = json.loads(file.read_text())
    assert {"commit", "versions", "machine"} <= set(content["meta"])
    assert {"name", "variant", "metric", "unit", "value"} == set(content["rows"][0])
    assert sum(row["variant"] == "sm_90" for row in content["rows"]) == 3 * 9


def test_a_broken_rule_fails_the_command(monkeypatch, capsys):
    slow = traffic.Traffic(traffic.Rows("mse", "bf16", 4), "forward", 106, 100, counted=True)
    monkeypatch.setattr(traffic, "moved", lambda ops: [slow])
    assert main(["--ops", "soft_kd", "--parts", "traffic"]) == 1
    assert f"{slow.name}: moves 1.060 x the floor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "softkd"], "argument --ops: invalid choice: 'softkd'"),
        (["--archs", "75"], "argument --archs: invalid choice: 75"),
        (["--json", "/nowhere/x.json"], "--json: no folder /nowhere"),
    ],
)
def test_bad_arguments(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_the_emulator_the_command_ends_in_one_line(server):
    code = "import sys, runpy; sys.modules['ptx_emulator'] = None; "
    code += "runpy.run_module('benchmarks.report', run_name='__main__')"
    done = server.call(script=code)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run pip install --editable tools/ptx_emulator" in done.stderr
