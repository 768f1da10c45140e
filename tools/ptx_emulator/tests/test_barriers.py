"""Barriers of a block: votes, thread counts, and arrivals without a wait."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_emulator import Emulator
from ptx_text import SHARED, kernel, together

PARAMETERS = ".param .u64 a, .param .u64 b"
VOTER = "ld.param.u64 %rd2, [b];\nsub.s64 %rd3, %rd1, %rd0;\nadd.s64 %rd2, %rd2, %rd3;\n"
VOTER += "ld.global.u32 %r5, [%rd2];\nsetp.ne.u32 %p0, %r5, 0;\nmov.u32 %r6, 0;\n"
PRED = "selp.u32 %r6, 1, 0, %p1;"
# the first 64 threads vote among themselves, the others at another barrier
HALVES = "setp.ge.u32 %p2, %r0, 64;\n@%p2 bra HIGH;\n@LOW@\nbra END;\nHIGH:\n@HIGH@\nEND:\n"
STORE = "\nst.global.u32 [%rd1], %r6;"
# 64 producers fill shared memory and continue; 64 consumers wait for them
PRODUCE = """setp.ge.u32 %p0, %r0, 64;
@%p0 bra CONSUMER;
mul.lo.u32 %r5, %r0, 3;
st.shared.u32 [%r2], %r5;
ARRIVE;
mov.u32 %r6, 1;
bra END;
CONSUMER:
SYNC;
ld.shared.u32 %r6, [%r3];
END:
"""
CODES = {
    "popc": "bar.red.popc.u32 %r6, 0, %p0;",
    "popc_not": "barrier.cta.red.popc.aligned.u32 %r6, 1, 128, !%p0;",
    "and": f"bar.red.and.pred %p1, 0, %p0;\n{PRED}",
    "or": f"barrier.red.or.pred %p1, 3, %p0;\n{PRED}",
    "and_halves": HALVES.replace("@LOW@", f"bar.red.and.pred %p1, 1, 64, %p0;\n{PRED}").replace(
        "@HIGH@", f"bar.red.and.pred %p1, 2, 64, %p0;\n{PRED}"
    ),
    "popc_halves": HALVES.replace("@LOW@", "bar.red.popc.u32 %r6, 1, 64, %p0;").replace(
        "@HIGH@", "bar.red.popc.u32 %r6, 2, 64, !%p0;"
    ),
}
PAIRS = {
    "bar": ("bar.arrive 1, 128", "bar.sync 1, 128"),
    "barrier": ("barrier.cta.arrive.aligned 1, 128", "barrier.cta.sync.aligned 1, 128"),
    "register": ("mov.u32 %r7, 5;\nbar.arrive %r7, 128", "mov.u32 %r7, 5;\nbar.sync %r7, 128"),
}


def text() -> str:
    votes = (kernel(VOTER + code + STORE, PARAMETERS, name=name) for name, code in CODES.items())
    passes = (
        kernel(
            SHARED + PRODUCE.replace("ARRIVE", arrive).replace("SYNC", sync) + STORE,
            shared=512,
            name=f"pass_{name}",
        )
        for name, (arrive, sync) in PAIRS.items()
    )
    return together(*votes, *passes)


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("values", ["none", "all", "some", "low", "one"])
def test_vote_at_a_barrier(emulator, name, values):
    thread = np.arange(128)
    chosen = {"none": thread < 0, "all": thread >= 0, "some": thread % 3 == 0, "low": thread < 64}
    yes = chosen.get(values, thread == 77)
    low, high = yes[:64], yes[64:]
    want = {
        "popc": [yes.sum()] * 2,
        "popc_not": [(~yes).sum()] * 2,
        "and": [yes.all()] * 2,
        "or": [yes.any()] * 2,
        "and_halves": [low.all(), high.all()],
        "popc_halves": [low.sum(), (~high).sum()],
    }[name]
    result = np.zeros(128, "u4")
    for seed in (0, 5):
        arguments = [result, yes.astype("u4")]
        assert emulator.launch(name, arguments, 1, 128, seed=seed, outputs=[0]).reports == ()
        assert (result == np.repeat(want, 64)).all()


@pytest.mark.parametrize("name", PAIRS)
def test_producers_arrive_and_consumers_wait(emulator, name):
    result = np.zeros(128, "u4")
    for seed in range(4):
        launch = emulator.launch(f"pass_{name}", [result], 1, 128, seed=seed, outputs=[0])
        assert launch.reports == ()
        assert (result[:64] == 1).all()
        assert (result[64:] == 3 * np.arange(64)[::-1]).all()
