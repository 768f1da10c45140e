"""`make gpu`: its parts on a CPU, and its behaviour without a GPU, without time, after a crash."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import featkd
from benchmarks.gpu import facts, page, part, sanitizer, schedule
from benchmarks.gpu.recorder import Cut, Failed, NotHere, Recorder, read
from featkd.kernels.launch import redirect

from . import accuracy, behaviour
from .forms import FORMS, MAIN

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(command, cwd=facts.ROOT, capture_output=True, text=True)


# items that a part must run on a CPU
RUN = {
    "compiled": {f"lift_head/spectral/{check.__name__}" for check in behaviour.COMPILED[:-2]},
    "sanitizer": {"none/projected_feature_kd/spectral-as-wide"},
}


PARTS = {part.name: part.work for wave in schedule.WAVES for part in wave if part.work}


@pytest.mark.parametrize("name", [name for name in PARTS if name != "linalg"])
def test_a_part_runs_on_a_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(facts.ROOT)
    part.main([PARTS[name], "cpu", "0", "1", str(tmp_path / "items")])
    items = read(tmp_path / "items")
    assert items
    for item in items:
        assert item.status == "passed" or item.message == "needs a GPU", item
    assert RUN.get(name, set()) <= {item.name for item in items if item.status == "passed"}


def test_every_check_is_listed_once_in_every_precision():
    """Items are told apart by their checks' names."""
    names = [x.__name__ for x in (*behaviour.QUICK, *behaviour.COMPILED, *behaviour.LARGE)]
    assert len(names) == len(set(names))
    for check in ("cuda_graph", "compiled"):
        others = {f"{check}_{name}" for name in ("fp64", "autocast_bf16", "autocast_fp16")}
        assert {check, *others} <= set(names)


@pytest.mark.parametrize("name", behaviour.OTHERS)
def test_another_precision_is_noticed(name: str):
    """Results in float32 do not pass for those of another precision."""
    precision = behaviour.OTHERS[name]
    form = FORMS["lift_head/spectral"]
    sizes = behaviour.sizes_for(form, CPU)
    got, want = (
        accuracy.run_ours(form, accuracy.inputs_of(form, sizes, p, CPU), sizes, p)
        for p in (behaviour.FP32, precision)
    )
    with pytest.raises(AssertionError, match=r"torch\.float32, not|differs by"):
        behaviour.assert_close(got, want, behaviour.close(precision, CPU, 1e-4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 2
    assert "no CUDA device is visible" in done.stderr


def test_a_run_is_written_down(tmp_path: Path):
    done = run("--cpu-parts", "--only", "linalg", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "cpu.json").read_text())
    (found,) = results["parts"]
    assert found["good"]
    assert found["passed"] >= 5
    assert not found["failed"]
    assert results["meta"]["torch"] == torch.__version__
    assert "| linalg | yes |" in (tmp_path / "cpu.md").read_text()


def test_items_are_told_apart(tmp_path: Path):
    recorder = Recorder(tmp_path / "items")

    def fail() -> None:
        raise Failed("why", [("featkd", "time", "us", 2.0)])

    def absent() -> None:
        raise NotHere("no such thing")

    def slow() -> None:
        raise Cut("too slow")

    recorder.run("good", lambda: [("featkd", "time", "us", 1.0)])
    recorder.run("bad", fail)
    recorder.run("absent", absent)
    recorder.run("slow", slow)
    good, bad, skipped, cut = read(tmp_path / "items")
    assert (cut.status, cut.message) == ("cut", "too slow")
    assert not schedule.Outcome(schedule.Part("made", "", 1), items=[good, cut]).is_good
    assert schedule.Outcome(schedule.Part("made", "", 1), items=[good, skipped]).is_good
    assert (good.status, good.figures) == ("passed", (("featkd", "time", "us", 1.0),))
    assert (bad.status, bad.figures) == ("failed", (("featkd", "time", "us", 2.0),))
    assert "why" in bad.message
    assert (skipped.status, skipped.message) == ("skipped", "no such thing")
    again = Recorder(tmp_path / "items")  # of a process that goes on
    again.run("bad", lambda: pytest.fail("ran twice"))


def _started(code: str, tmp_path: Path, limit: int) -> schedule._Process:
    file = tmp_path / "items"
    made, environment = schedule.Part("made", "", limit), {"PYTHONPATH": str(facts.ROOT)}
    command = [sys.executable, "-c", code, str(file)]
    process = schedule._Process(made, command, environment, file, tmp_path / "log")
    process.start()
    while process.look(time.monotonic() + 60):
        time.sleep(0.02)
    return process


def test_a_crash_leaves_the_items_after_it(tmp_path: Path):
    code = (
        "import os, sys; from pathlib import Path; from benchmarks.gpu.recorder import Recorder\n"
        "r = Recorder(Path(sys.argv[1]))\n"
        "r.run('one', lambda: None); r.run('crash', os.abort); r.run('two', lambda: None)\n"
    )
    process = _started(code, tmp_path, 60)
    outcome = schedule._outcome(process.part, [process])
    assert [item.status for item in outcome.items] == ["passed", "begun", "passed"]
    assert not outcome.is_good
    assert "crash" in outcome.problem


def test_a_broken_device_leaves_the_items_after_it(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu.recorder import Recorder\n"
        "def bad(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "r = Recorder(Path(sys.argv[1]))\n"
        "r.run('bad', bad); r.run('two', lambda: None)\n"
    )
    process = _started(code, tmp_path, 60)
    assert process.restarts == 1
    assert [item.status for item in read(tmp_path / "items")] == ["failed", "passed"]


def test_what_hangs_is_ended(tmp_path: Path):
    process = _started("import time; time.sleep(600)", tmp_path, 1)
    assert "ended after 1 s" in process.problem


def test_a_slow_case_under_the_sanitizer_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors"\nexec sleep 60\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitizer, "_START_UP", 169)  # of the part's 170 s
    sanitizer.checks(Recorder(tmp_path / "items"), torch.device("cuda"), 0, 8)
    items = read(tmp_path / "items")
    assert [item.name for item in items] == [
        "memcheck/control",
        "racecheck/projected_feature_kd/mse-projector-norm",
    ]
    assert {item.status for item in items} == {"cut"}
    assert sum(item.seconds for item in items) < 5
    results = page.content({}, [schedule.Outcome(schedule.Part("made", "", 1), items=items)])
    assert [item["name"] for item in results["parts"][0]["cut"]] == [item.name for item in items]


@pytest.mark.parametrize(
    ("name", "code", "output", "problem"),
    [
        ("case", 0, "the case ran\n========= ERROR SUMMARY: 0 errors", ""),
        ("case", 0, "the case ran\n========= ERROR SUMMARY: 2 errors", "memcheck: "),
        ("case", 0, "the case ran", "gave no summary"),
        ("case", 0, "========= ERROR SUMMARY: 0 errors", "ERROR SUMMARY"),
        ("case", 1, "the case ran\n========= ERROR SUMMARY: 0 errors", "exit code 1"),
        ("control", 1, "========= ERROR SUMMARY: 9 errors", ""),
        ("control", 0, "the case ran\n========= ERROR SUMMARY: 0 errors", "missed a write"),
        ("control", 1, "", "gave no summary"),
    ],
)
def test_reports_of_the_sanitizer_are_read(name: str, code: int, output: str, problem: str):
    if not problem:
        sanitizer.judge(name, "memcheck", code, output)
        return
    with pytest.raises(AssertionError, match=problem):
        sanitizer.judge(name, "memcheck", code, output)


def test_the_sanitizer_checks_every_kernel_of_the_ops():
    ran: set[str] = set()
    with featkd.use_backend("triton"), redirect(lambda kernel, *_: ran.add(kernel.fn.__name__)):
        for form in (FORMS[name] for name in MAIN):
            sizes = behaviour.sizes_for(form, CPU)
            tensors = accuracy.inputs_of(form, sizes, behaviour.FP32, CPU)
            accuracy.results(form, tensors, form.ours(tensors, sizes))
    assert len(ran) == 6
    for name in (*ran, sanitizer.featkd_write_past_the_end.fn.__name__):
        assert re.search(sanitizer.KERNELS, name), name
    assert not re.search(sanitizer.KERNELS, "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n")


@pytest.mark.usefixtures("compiled_kernels")
def test_the_control_of_the_sanitizer_writes_past_its_tensor():
    run_triton = pytest.importorskip("ptx_emulator").run_triton
    launch = run_triton(
        sanitizer.featkd_write_past_the_end, (1,), out=torch.zeros(8), ELEMENTS=1024
    )
    assert launch.reports


def test_tables_go_into_a_document(tmp_path: Path):
    meta = {"gpus": [["GPU X", 1, 9, 0]], "driver": "1", "nvcc": "", "commit": "c", "time": "t"}
    rows = [
        {"name": "speed/op/form/1x2/bf16", "variant": name, "metric": "gpu_us", "unit": "us",
         "value": value}
        for name, value in (("eager", 30.0), ("compile", 20.0), ("featkd", 10.0))
    ]  # fmt: skip
    source = tmp_path / "gpu.json"
    source.write_text(json.dumps({"meta": meta, "parts": [], "rows": rows}))
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- bench gpu -->\nearlier\n<!-- end bench gpu -->\nafter\n")
    page.write_into(document, source)
    text = document.read_text()
    assert "| op/form/1x2/bf16 | 30.0 | 20.0 | failed | 10.0 | 2.00 |" in text
    assert "GPU X" in text
    assert "earlier" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_missing_packages_are_named():
    lines = facts.carry(["jsonargparse", "ninja"])
    assert "typeshed-client" in lines[0]
    assert "csrc" in lines[1]
