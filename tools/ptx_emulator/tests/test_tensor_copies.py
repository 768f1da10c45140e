"""Copies of boxes of tensors by tensor maps, compared with slices of the tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from ptx_emulator import Emulator, TensorMap
from ptx_text import kernel, together

TYPES = {2: np.uint16, 4: np.uint32}
START = """mov.u32 %r2, s;
add.u32 %r10, %r2, 8192;
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared.b64 [%r10], 1;
bar.sync 0;
mov.b64 %rd5, map;
cvta.param.u64 %rd6, %rd5;
"""
WAIT = "LOOP:\nmbarrier.try_wait.parity.shared.b64 %p2, [%r10], 0;\n@!%p2 bra LOOP;\n"
MOVE = """mov.u32 %r3, %r1;
COPY:
add.u32 %r4, %r2, %r3;
cvt.u64.u32 %rd3, %r3;
add.s64 %rd3, %rd0, %rd3;
FIRST
SECOND
add.u32 %r3, %r3, 128;
setp.lt.u32 %p3, %r3, BYTES;
@%p3 bra COPY;
"""


@dataclass(frozen=True)
class Box:
    """A box of a tensor; its first element may lie outside of the tensor."""

    sizes: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    item: int = 4
    swizzle: int = 0

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.item

    @property
    def coordinates(self) -> str:
        return "{" + ", ".join(str(x) for x in self.at[::-1]) + "}"

    def tensor(self) -> np.ndarray:
        count = int(np.prod(self.sizes))
        return np.arange(1, count + 1, dtype=TYPES[self.item]).reshape(self.sizes)

    def wanted(self) -> np.ndarray:
        """Returns the box, with zeros outside of the tensor, and swizzled."""
        padded = np.pad(self.tensor(), [(b, b) for b in self.box])
        ends = zip(self.at, self.box, strict=True)
        box = padded[tuple(slice(b + a, b + a + b) for a, b in ends)]
        if not self.swizzle:
            return np.ascontiguousarray(box).ravel()
        units = np.ascontiguousarray(box).view(np.uint8).reshape(-1, 16)
        result, width = np.empty_like(units), self.swizzle // 16
        for i, unit in enumerate(units):
            # the permutation changes every 128 bytes
            turn = i // 8 % width
            result[i ^ turn] = unit
        return result.ravel().view(TYPES[self.item])


BOXES = [
    Box((100,), (64,), (8,)),
    Box((40, 64), (16, 32), (8, 16)),
    Box((40, 64), (16, 32), (32, 48)),  # beyond both ends
    Box((40, 64), (16, 32), (-3, -4)),
    Box((5, 12, 16), (2, 4, 8), (3, 9, 4)),
    Box((40, 64), (16, 64), (4, 0), item=2, swizzle=128),
    Box((40, 64), (16, 32), (4, 32), item=2, swizzle=64),
    Box((40, 64), (32, 8), (0, 8), swizzle=32),
    Box((3, 2, 4, 6, 16), (2, 1, 2, 3, 4), (1, 1, 1, 2, 8), item=4),
]


def load(box: Box) -> str:
    ON = "mbarrier::complete_tx::bytes"
    text = f"cp.async.bulk.prefetch.tensor.{len(box.sizes)}d.L2.global.tile "
    text += f"[%rd6, {box.coordinates}];\n"
    text += f"@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], {box.bytes};\n"
    text += f"@%p1 cp.async.bulk.tensor.{len(box.sizes)}d.shared::cluster.global.tile.{ON} "
    text += f"[%r2], [%rd6, {box.coordinates}], [%r10];\n" + WAIT
    move = MOVE.replace("FIRST", "ld.shared.b32 %r5, [%r4];")
    move = move.replace("SECOND", "st.global.b32 [%rd3], %r5;")
    return START + text + move.replace("BYTES", str(box.bytes))


def store(box: Box) -> str:
    move = MOVE.replace("FIRST", "ld.global.b32 %r5, [%rd3];")
    move = move.replace("SECOND", "st.shared.b32 [%r4], %r5;").replace("BYTES", str(box.bytes))
    text = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
    text += f"@%p1 cp.async.bulk.tensor.{len(box.sizes)}d.global.shared::cta.tile.bulk_group "
    text += f"[%rd6, {box.coordinates}], [%r2];\n"
    return START + move + text + "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"


def text() -> str:
    parameters = ".param .u64 a, .param .align 64 .b8 map[128]"
    named = {f"{f.__name__}{i}": f(box) for i, box in enumerate(BOXES) for f in (load, store)}
    files = (kernel(code, parameters, shared=8208, name=name) for name, code in named.items())
    moved = together(*files).replace("sm_80", "sm_90")
    return moved.replace(".align 16 .b8 s", ".align 1024 .b8 s")


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text(), count=True)


@pytest.mark.parametrize("number", range(len(BOXES)), ids=lambda i: str(BOXES[i].box))
def test_load(emulator, number):
    box = BOXES[number]
    tensor, out = box.tensor(), np.zeros(box.bytes // box.item, TYPES[box.item])
    args = [out, TensorMap(tensor, box.box, box.swizzle)]
    launch = emulator.launch(f"load{number}", args, 1, 32, outputs=[0], seed=1)
    assert [str(r) for r in launch.reports] == []
    assert (out == box.wanted()).all()
    inside = np.count_nonzero(box.wanted())
    assert launch.counters.global_read_bytes == inside * box.item


@pytest.mark.parametrize("number", range(len(BOXES)), ids=lambda i: str(BOXES[i].box))
def test_store_is_the_inverse_of_load(emulator, number):
    box = BOXES[number]
    tensor = np.zeros_like(box.tensor())
    args = [box.wanted(), TensorMap(tensor, box.box, box.swizzle)]
    launch = emulator.launch(f"store{number}", args, 1, 32)
    assert [str(r) for r in launch.reports] == []
    want = np.zeros_like(tensor)
    part = tuple(slice(max(a, 0), max(a + b, 0)) for a, b in zip(box.at, box.box, strict=True))
    want[part] = box.tensor()[part]
    assert (tensor == want).all()


# wrong maps for the kernel load1
BAD_MAPS = {
    "none": (bytes(128), "invalid-tensor-map"),
    "of another rank": (TensorMap(BOXES[0].tensor(), BOXES[0].box), "invalid-tensor-map"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_a_bad_map_is_reported(emulator, name):
    value, kind = BAD_MAPS[name]
    args = [np.zeros(BOXES[1].bytes // 4, np.uint32), value]
    assert kind in {r.kind for r in emulator.launch("load1", args, 1, 32).reports}


@pytest.mark.parametrize(
    ("array", "box", "swizzle", "error"),
    [
        (np.zeros((8, 8)), (8,), 0, "expected 1 to 5 sizes as the array has"),
        (np.zeros((8, 8)).T, (8, 8), 0, "the last dimension must be contiguous"),
        (np.zeros((8, 9), np.float32), (8, 8), 0, "multiples of 16 bytes"),
        (np.zeros((8, 8)), (300, 8), 0, "sizes must be from 1 to 256"),
        (np.zeros((8, 8)), (8, 8), 32, "at least the 64 bytes of a row of the box, got 32"),
    ],
)
def test_bad_maps(array, box, swizzle, error):
    with pytest.raises(ValueError, match=error):
        TensorMap(array, box, swizzle)


def test_maps_and_arrays_in_the_wrong_place(emulator):
    array = BOXES[0].tensor()
    with pytest.raises(TypeError, match=r"args\[0\]: a takes no tensor map"):
        emulator.launch("load0", [TensorMap(array, BOXES[0].box), array], 1, 32)
    with pytest.raises(TypeError, match=r"args\[1\]: map takes no array"):
        emulator.launch("load0", [array, array], 1, 32)
