"""Launches: arguments, sizes, bad input, the cache of libraries, reproducibility; the parser."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ptx_emulator import CompilerError, Emulator, PtxError, UnsupportedInstruction, build
from ptx_emulator.build import cache_folder
from ptx_emulator.parser import Address, Immediate, Instruction, Register, parse
from ptx_text import HEAD, SHARED, kernel, together

SCALE = "ld.param.f32 %f0, [c];\nld.global.f32 %f1, [%rd1];\nmul.rn.f32 %f1, %f1, %f0;\n"
SCALE += "st.global.f32 [%rd1], %f1;"
SIGNATURE = ".param .u64 .ptr .global .align 4 a, .param .f32 c, .param .s32 n"


@pytest.fixture(scope="module")
def emulator():
    return Emulator(kernel(SCALE, SIGNATURE, name="scale"))


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_arrays_of_numpy_and_torch_are_changed_in_place(emulator, make):
    a = make(8, dtype=np.float32 if make is np.arange else torch.float32)
    assert emulator.launch("scale", [a, 2.0, 8], 1, 8).reports == ()
    assert [float(x) for x in a] == [2.0 * i for i in range(8)]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ([], r"scale takes 3, got 0; expected scale\(pointer a, f32 c, s32 n\)"),
        ([np.zeros(8, np.float32), 2, 8], r"args\[1\]: int 2 does not fit \.f32 c; expected scale"),
        ([np.zeros(8, np.float32), 2.0, 2**40], r"args\[2\]: int 1099511627776 does not fit"),
        ([np.zeros(8, np.float32), 2.0, np.int64(3)], r"args\[2\]: int64"),
        ([np.zeros(8, np.float32), np.int32(2), 8], r"args\[1\]: int32 .* does not fit \.f32 c"),
        ([np.zeros(8, np.float32), 2.0, np.float32(8)], r"args\[2\]: float32 .* not fit \.s32 n"),
        ([3, 2.0, 8], r"args\[0\]: int 3 does not fit"),
        ([np.zeros(8, np.float32), np.zeros(2, np.float32), 8], r"args\[1\]: c takes no array"),
    ],
)
def test_wrong_arguments(emulator, args, error):
    with pytest.raises(TypeError, match=error):
        emulator.launch("scale", args, 1, 8)


def test_wrong_names_and_sizes(emulator):
    args = [np.zeros(8, np.float32), 2.0, 8]
    with pytest.raises(ValueError, match="no kernel 'scales'; the kernels are scale"):
        emulator.launch("scales", args, 1, 8)
    with pytest.raises(ValueError, match="block: 2048 threads, at most 1024 allowed"):
        emulator.launch("scale", args, 1, (1024, 2))
    with pytest.raises(ValueError, match="grid: sizes must be from 1 to"):
        emulator.launch("scale", args, 0, 8)
    with pytest.raises(TypeError, match=r"grid: expected an int or up to 3 of them, got 1\.5"):
        emulator.launch("scale", args, 1.5, 8)
    emulator.launch("scale", args, np.int64(1), (np.int32(8), 1))
    with pytest.raises(ValueError, match="a block of sm_80 may have 166912"):
        emulator.launch("scale", args, 1, 8, shared_bytes=163 * 1024 + 1)
    emulator.launch("scale", args, 1, 8, shared_bytes=163 * 1024)


STRIDED = """ld.param.u32 %r2, [n];
mul.wide.u32 %rd2, %r0, %r2;
add.s64 %rd2, %rd0, %rd2;
setp.ne.u32 %p0, %r0, 5;
@@ st.global.u32 [%rd2], %r0;"""


@pytest.fixture(scope="module")
def strided():
    two = ".param .u64 a, .param .u32 n"
    return Emulator(
        together(
            kernel(STRIDED.replace("@@", ""), two, name="all"),
            kernel(STRIDED.replace("@@", "@%p0"), two, name="gap"),
        ),
        count=True,
    )


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_gaps_between_the_elements_of_an_output_are_unchanged(strided, make):
    base = make(48, dtype=np.int32 if make is np.arange else torch.int32)
    launch = strided.launch("all", [base[::3], 12], 1, 16, outputs=[0])
    assert launch.reports == ()
    assert launch.counters.distinct_write_bytes == 64
    assert [int(x) for x in base] == [x if x % 3 else x // 3 for x in range(48)]
    (report,) = strided.launch("gap", [base[::3], 12], 1, 16, outputs=[0]).reports
    assert report.kind == "unwritten-output"
    assert "4 bytes at offset 60 of args[0]" in report.message


def test_a_wrong_argument_leaves_the_outputs_unchanged(strided):
    a = np.arange(4, dtype=np.int32)
    with pytest.raises(TypeError, match="does not fit"):
        strided.launch("all", [a, 2.5], 1, 4, outputs=[0])
    assert a.tolist() == [0, 1, 2, 3]


def test_unsupported_arrays(strided):
    with pytest.raises(ValueError, match=r"args\[0\]: arrays must not have negative strides"):
        strided.launch("all", [np.arange(4)[::-1], 4], 1, 4)
    with pytest.raises(TypeError, match=r"args\[0\]: tensors must be on the CPU, got one on meta"):
        strided.launch("all", [torch.empty(4, device="meta"), 4], 1, 4)
    empty = np.zeros((0, 3), np.int32)
    (report,) = strided.launch("all", [empty, 4], 1, 1, outputs=[0]).reports
    assert report.kind == "out-of-bounds"


def test_newer_targets_and_other_text():
    with pytest.raises(PtxError, match="target sm_100 is not supported; those that are: sm_75"):
        Emulator(kernel("", target="sm_100"))
    with pytest.raises(PtxError, match=r"\.version or \.target is missing"):
        Emulator("int main() {}")


@pytest.mark.parametrize(
    ("instruction", "why"),
    [
        ("tcgen05.fence::before_thread_sync;", "tcgen05.fence::before_thread_sync"),
        ("add.rna.f32 %f1, %f1, %f1;", "add.rna.f32"),
        ("cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;", "modifier .satfinite"),
        ("cp.reduce.async.bulk.commit_group;", "cp.reduce.async.bulk"),
        ("mul.s32 %r1, %r1, %r1;", "mul.s32"),
    ],
)
def test_unsupported_instructions_are_named_with_their_line(instruction, why):
    text = kernel(instruction)
    line = next(i for i, x in enumerate(text.splitlines(), 1) if instruction in x)
    with pytest.raises(UnsupportedInstruction, match=f"PTX line {line}: .*{why}"):
        Emulator(text)


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompilerError, match="none was found: install"):
        Emulator(kernel("", name="needs_compiler"))


def test_the_library_is_kept_and_may_be_built_twice_at_the_same_time(tmp_path, monkeypatch):
    ptx = kernel("", name="together")
    Emulator(ptx)
    engines = [x for x in cache_folder().iterdir() if x.suffix == ".o"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for engine in engines:  # so that only the kernel is compiled again
        shutil.copy(engine, cache_folder())
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda _: Emulator(ptx).library, range(2)))
    assert libraries[0] == libraries[1]
    kept = [x for x in cache_folder().iterdir() if x.suffix != ".o"]
    assert kept == [libraries[0]]
    built = libraries[0].stat().st_mtime_ns
    assert Emulator(ptx).library.stat().st_mtime_ns == built


def test_results_and_reports_repeat_and_do_not_depend_on_the_number_of_workers():
    race = SHARED + "mov.u32 %r5, s;\nst.shared.u32 [%r5], %r0;\nbar.sync 0;\n"
    race += "ld.shared.u32 %r6, [%r5];\nmov.u32 %r7, %ctaid.x;\nmul.wide.u32 %rd2, %r7, 4;\n"
    race += "add.s64 %rd2, %rd0, %rd2;\nst.global.u32 [%rd2], %r6;"
    emulator = Emulator(kernel(race, shared=256))
    outcomes = []
    for seed, workers in [(7, 1), (7, 2), (7, 2), (8, 2)]:
        a = np.zeros(50, np.uint32)
        reports = emulator.launch("k", [a], 50, 64, seed=seed, workers=workers).reports
        outcomes.append((a.tolist(), reports))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[3][0] != outcomes[0][0]
    assert len(set(outcomes[0][0])) > 1  # the last writer differs between blocks


def test_portable_fibers_give_the_same_results_and_reports(monkeypatch):
    """The stack switch without assembly, which is used on other processors than x86-64."""
    swap = SHARED + "st.shared.u32 [%r2], %r0;\n@@\nld.shared.u32 %r5, [%r3];\n"
    swap += "shfl.sync.bfly.b32 %r6, %r5, 3, 31, -1;\nbar.sync 0;\nst.global.u32 [%rd1], %r6;"
    ptx = together(
        kernel(swap.replace("@@", "bar.sync 0;"), shared=512, name="clean"),
        kernel(swap.replace("@@", ""), shared=512, name="faulty"),
    )
    outcomes = []
    for flags in ((), ("-DPTX_EMULATOR_PORTABLE_FIBERS",)):
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
        if flags:
            monkeypatch.setattr(build, "_ENGINE_LEVEL", "-O0")  # its engine is used here only
        emulator, found = Emulator(ptx), []
        for name in ("clean", "faulty"):
            for seed in (0, 3):
                a = np.zeros(128, np.uint32)
                # both blocks write the same elements: the faulty kernel's result depends on which
                # block is the last one
                workers = 2 if name == "clean" else 1
                launch = emulator.launch(name, [a], 2, 128, seed=seed, workers=workers)
                found.append((a.tolist(), launch.reports))
        outcomes.append((emulator.library, found))
    (fast, expected), (portable, got) = outcomes
    assert [b"swapcontext" in x.read_bytes() for x in (fast, portable)] == [False, True]
    assert got == expected
    (clean, _), *_ = expected
    assert clean == [127 - (t ^ 3) for t in range(128)]
    assert {r.kind for r in expected[2][1]} >= {"shared-race"}


def test_unchecked_run_gives_the_same_result():
    ptx = kernel(SCALE, SIGNATURE, name="scale")
    a = np.arange(8, dtype=np.float32)
    assert Emulator(ptx, check=False).launch("scale", [a, 2.0, 8], 1, 8).reports == ()
    assert a.tolist() == [2.0 * i for i in range(8)]


def test_parser_gives_typed_instructions_with_places():
    text = HEAD + '.file 1 "k.py"\n.visible .entry k(.param .u32 n)\n{\n.reg .b32 %r<3>;\n'
    text += ".loc 1 42 0\n@!%p0 ld.global.v2.u32 {%r0, %r1}, [%rd0+-8]; // why\n"
    text += "add.s32 %r2,\n%r1,0x10;\n}\n"
    (function,) = parse(text).functions
    load, add = (s for s in function.body if isinstance(s, Instruction))
    assert (load.opcode, load.line, str(load.source)) == ("ld.global.v2.u32", 9, "k.py:42")
    assert load.guard == Register("%p0", negated=True)
    assert load.operands[1] == Address("%rd0", -8)
    assert (add.line, add.operands[2]) == (10, Immediate(16, "int"))
    assert function.parameters[0].name == "n"
    assert function.parameters[0].bytes == 4
