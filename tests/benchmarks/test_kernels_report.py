"""featkd kernels report: planted faults of compiled kernels are seen, figures are as by hand."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import triton
import triton.language as tl

from featkd.benchmarks import aot, cases, measured, report, traffic
from featkd.benchmarks.chips import CHIPS, chip_of, modelled_us
from featkd.cli import main
from featkd.ptx import run_triton


@pytest.fixture(scope="module", autouse=True)
def cache(compiled_kernels):
    """All share the test run's own cache folder."""


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
def product(source, target, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(source + at)
    tl.store(target + at, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def sorted_tile(source, target, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(source + at)
    for _ in range(4):
        x = x * tl.sum(x, 0)[None, :] + tl.trans(x) * tl.max(x, 1)[:, None]
    tl.store(target + at, x)


def compiled(kernel, size: int, arch: int = 80, **constants) -> report.Compiled:
    arguments = {"source": torch.zeros(size * size), "target": torch.zeros(size * size)}
    arguments |= {"N": size, **constants}
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}
    launch = aot.Recorded(kernel, (1,), arguments, options)
    return report.Compiled("case", launch.name, arch, aot.compile_for(launch, arch))


@pytest.mark.parametrize("arch", [chip.arch for chip in CHIPS])
def test_good_kernels_break_no_rule(arch):
    assert compiled(copy, 128, arch).broken == []
    good = compiled(product, 32, arch, PRECISION="tf32")
    assert good.broken == []
    assert good.code.products
    assert good.code.tensor_core > 0
    assert good.code.instructions == "HMMA"


@pytest.mark.parametrize(
    ("kernel", "size", "constants", "rule"),
    [
        (strided, 128, {}, "no 16-byte load"),
        (in_double, 128, {}, "float64 instructions"),
        (product, 32, {"PRECISION": "ieee"}, "without tensor cores"),
        (sorted_tile, 128, {}, "spills: "),
    ],
    ids=["scalar loads", "double", "no tensor cores", "spills"],
)
def test_planted_faults_are_seen(kernel, size, constants, rule):
    broken = compiled(kernel, size, **constants).broken
    assert any(rule in text for text in broken), broken


def test_narrow_maps_are_compiled_too():
    """By default, and of each op with products those that have broken a rule."""
    asked = report.questions(tuple(cases.OPS), "narrow", ("fp32", "bf16", "fp16"))
    assert {q.op for q in asked} == {"projected_feature_kd", "widelast_projection", "lift_head"}
    names = [q.case.name for q in asked]
    assert len(names) == 8
    assert sum("32to64" in name for name in names) == sum("96to192" in name for name in names) == 4


def test_rows_that_begin_anywhere_need_no_wide_load():
    code = aot.Code(64, 0, 0, 0, False, 0, "", 1, 0, 0, False)
    assert report.Compiled("case", "kernel", 80, code).broken == []


@pytest.mark.parametrize(("arch", "broken"), [(80, 1), (90, 0)])
def test_shared_memory_must_fit_the_chip(arch, broken):
    code = aot.Code(64, 0, 0, 200 * 1024, False, 0, "", 1, 1, 0, True)
    found = report.Compiled("case", "kernel", arch, code).broken
    assert len(found) == broken
    assert all("204800 bytes of shared memory, A100 has 166912" in text for text in found)


def test_modelled_time_is_the_longer_of_the_two():
    chip = chip_of(80)
    assert modelled_us(chip, 2039e3, {}) == pytest.approx(1)
    assert modelled_us(chip, 0, {"mma.bf16": 312 * 10**6}) == pytest.approx(1)
    assert modelled_us(chip, 2039e3, {"add.f32": 39 * 10**6}) == pytest.approx(2)
    with pytest.raises(ValueError, match="archs: expected some of 80, 90, 100; got 75"):
        chip_of(75)


def test_traffic_of_the_loss_without_a_projector_is_the_floor():
    (case,) = (
        c
        for c in cases.select(["projected_feature_kd"], "small", ["bf16"], ["both"])
        if c.problem.form == "mse-widelast"
    )
    launch, scaling = traffic.count(case)
    maps = 3 * 4 * 196 * 384 * 2  # student, teacher, gradient
    assert launch.floor == maps
    assert maps < launch.moved < 1.01 * maps  # and each program's sum
    assert traffic.over_floor([launch]) < 1.01
    # the gradient is read and written once more when the upstream factor is known
    assert scaling.moved == 2 * maps // 3 + 4
    assert traffic.over_floor([launch, scaling]) == pytest.approx(5 / 3, rel=0.01)


def test_broken_traffic_rules_are_named():
    counters = traffic.Counters(distinct_read_bytes=900, distinct_write_bytes=500)
    launch = traffic.Traffic("kernel", counters, {(0, 1000): 1000})
    for op, expected in (("projected_feature_kd", 2), ("widelast_projection", 1), ("soft_kd", 0)):
        found = report.Moved("case", op, [launch], 2.6, 1).broken
        assert len(found) == expected
    assert report.Moved("case", "soft_kd", [launch], 9.0, 1).broken == []


def test_every_launch_is_timed():
    def timer(kernel, grid, arguments, options):
        run_triton(kernel, grid, check=False, **arguments, **options)
        return 2.5

    (case,) = cases.select(["soft_kd"], "small", ["fp32"], ["both"])[:1]
    name, timed = measured.measure([case], "cpu", timer)
    assert [row.kernel for row in timed] == ["loss_and_logit_gradient", "scale"]
    assert "2.50" in report.measured_table(name, timed)
    (question,) = report.questions(["soft_kd"], "small", ["fp32"])[:1]
    rows = report.figures(report._compile(question, 90), [], name, timed)
    assert rows[-2] == (
        "soft_kd/indices/4x1000/fp32/loss_and_logit_gradient",
        "cpu measured",
        "time",
        "us",
        2.5,
    )


def test_command_writes_csv_and_json(tmp_path, capsys):
    files = [tmp_path / name for name in ("report.json", "report.csv")]
    words = ["kernels", "report", "--ops", "soft_kd", "--dtypes", "fp32", "--archs", "90"]
    words += ["--count", "none", "--json", str(files[0]), "--csv", str(files[1])]
    assert main(words) == 0
    assert "0 broken rules" in capsys.readouterr().out
    content = json.loads(files[0].read_text())
    assert {"commit", "versions", "machine", "chips"} <= set(content["meta"])
    assert {"name", "variant", "metric", "unit", "value"} == set(content["rows"][0])
    rows = list(csv.DictReader(files[1].open()))
    assert len(rows) == len(content["rows"]) >= 9
    assert {row["variant"] for row in rows} == {"sm_90"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repor"], "kernels: expected report; got 'repor'"),
        (["report", "--ops", "softkd"], "--ops: expected projected_feature_kd"),
        (["report", "--archs", "75"], "--archs: expected 80, 90, 100; got '75'"),
        (["report", "--json", "/nowhere/x.json"], "--json: no folder /nowhere"),
        (["report", "--size", "3"], "see featkd kernels report --help"),
    ],
)
def test_bad_arguments(capsys, words, message):
    assert main(["kernels", *words]) == 2
    assert message in capsys.readouterr().err
