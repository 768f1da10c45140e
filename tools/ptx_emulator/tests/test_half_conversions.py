"""cvt from and to halves: all 65,536 halves, and values between and next to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instruction_cases import KINDS, decode
from ptx_emulator import Emulator
from ptx_text import kernel, together

HALVES = ("f16", "bf16")
WIDE = ("f32", "f64")
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
INTS = ("s16", "u16", "s32", "u64")
BITS = np.arange(65536, dtype="u4").astype("u2")
# (target, source, modifiers)
CONVERSIONS = [
    *((wide, half, "") for wide in WIDE for half in HALVES),
    *((f"{half}", wide, mode) for half in HALVES for wide in WIDE for mode in ("rn", "rz")),
    *((half, "f64", mode) for half in HALVES for mode in ("rm", "rp")),
    *((half, "f32", f"{mode}.relu") for half in HALVES for mode in ("rn", "rz")),
    *((f"{half}x2", "f32", mode) for half in HALVES for mode in ("rn", "rz", "rn.relu")),
    *((kind, half, mode) for kind in INTS for half in HALVES for mode in WHOLE),
    *((half, kind, mode) for half in HALVES for kind in INTS for mode in ("rn", "rz", "rm", "rp")),
]
PARAMETERS = ".param .u64 a, .param .u64 b, .param .u64 c"


def convert(target: str, source: str, modifiers: str) -> str:
    """Returns a kernel that converts `b`, or `b` and `c` to the halves of pairs."""
    to, _, store, _, size = KINDS[target]
    from_, load, _, from_size, _ = KINDS[source]
    to, text = f"{to}5", "mov.u32 %r2, %ctaid.x;\nmad.lo.u32 %r0, %r2, 1024, %r0;\n"
    for register, name in ((1, "b"), (2, "c")) if target.endswith("x2") else ((1, "b"),):
        text += f"ld.param.u64 %rd2, [{name}];\nmul.wide.u32 %rd3, %r0, {from_size[1]};\n"
        text += f"add.s64 %rd2, %rd2, %rd3;\nld.global.{load} {from_}{register}, [%rd2];\n"
    opcode = ".".join(x for x in ("cvt", modifiers, target, source) if x)
    operands = f"{from_}1, {from_}2" if target.endswith("x2") else f"{from_}1"
    text += f"{opcode} {to}, {operands};\nmul.wide.u32 %rd4, %r0, {size[1]};\n"
    text += f"add.s64 %rd4, %rd0, %rd4;\nst.global.{store} [%rd4], {to};"
    return kernel(text, PARAMETERS, name="_".join(["cvt", target, source, *modifiers.split(".")]))


def text() -> str:
    return together(*(convert(*c) for c in CONVERSIONS), target="sm_90")


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


def run(emulator: Emulator, conversion: tuple[str, str, str], *operands: np.ndarray) -> np.ndarray:
    target, source, modifiers = conversion
    padded = [np.pad(x, (0, -len(x) % 1024)) for x in operands]
    result = np.zeros(len(padded[0]), KINDS[target][4])
    name = "_".join(["cvt", target, source, *modifiers.split(".")])
    arguments = [result, *padded, *[None] * (2 - len(padded))]
    assert emulator.launch(name, arguments, len(result) // 1024, 1024, outputs=[0]).reports == ()
    return result[: len(operands[0])]


def narrowed(x: np.ndarray, half: str, modifiers: str) -> np.ndarray:
    """Rounds float64 values to halves by a search among all halves; returns their bits."""
    mode, *relu = modifiers.split(".")
    infinity = 0x7C00 if half == "f16" else 0x7F80
    ordered = decode(BITS[: infinity + 1], half)
    ordered[infinity] = 2.0 * 2.0 ** np.floor(np.log2(ordered[infinity - 1]))
    size = np.minimum(np.abs(x), ordered[infinity])
    low = np.searchsorted(ordered, size, side="right") - 1
    high = np.minimum(low + 1, infinity)
    middle = ordered[low] / 2 + ordered[high] / 2
    between = ordered[low] < size
    up = {
        "rn": (size > middle) | ((size == middle) & between & (low % 2 == 1)),
        "rz": np.zeros_like(between),
        "rm": between & np.signbit(x),
        "rp": between & ~np.signbit(x),
    }[mode]
    bits = np.where(up, high, low)
    past = (np.abs(x) >= ordered[infinity]) & np.isfinite(x)
    stays = {"rn": False, "rz": True, "rm": ~np.signbit(x), "rp": np.signbit(x)}[mode]
    bits = np.where(past & stays, infinity - 1, bits) | np.signbit(x) << 15
    if relu:
        bits = np.where(np.signbit(x), 0, bits)
    return np.where(np.isnan(x), 0x7FFF, bits).astype("u2")


def neighbourhood(half: str, wide: str) -> np.ndarray:
    """Returns all halves, the middles between neighbours, and the values next to both."""
    exact = decode(BITS, half)
    with np.errstate(all="ignore"):
        points = np.sort(exact[np.isfinite(exact)])
        middle = points[:-1] / 2 + points[1:] / 2
        points = np.concatenate([points, middle]).astype(KINDS[wide][3])
        down, up = (np.nextafter(points, points.dtype.type(x)) for x in (-np.inf, np.inf))
    past = 2.0 ** (16 if half == "f16" else 127) * np.array([1, 1.5, -1, -1.5, 1.996, -1.999])
    ends = np.concatenate([past, [np.nan, np.inf, -np.inf, -0.0]]).astype(points.dtype)
    return np.concatenate([points, down, up, ends])


def chosen(*targets: str, source: tuple[str, ...]) -> list[tuple[str, str, str]]:
    return [c for c in CONVERSIONS if c[0] in targets and c[1] in source]


@pytest.mark.parametrize("conversion", chosen(*WIDE, source=HALVES), ids="-".join)
def test_widening_every_half(emulator, conversion):
    result = run(emulator, conversion, BITS)
    dtype = torch.float16 if conversion[1] == "f16" else torch.bfloat16
    want = torch.from_numpy(BITS.view("i2")).view(dtype).double().numpy()
    nan = np.isnan(want)
    assert (np.isnan(result) == nan).all()
    assert (result[~nan] == want[~nan]).all()
    assert (np.signbit(result) == np.signbit(want))[~nan].all()


@pytest.mark.parametrize("conversion", chosen(*HALVES, source=WIDE), ids="-".join)
def test_narrowing_to_every_half_and_between_all_neighbours(emulator, conversion):
    half, wide, modifiers = conversion
    inputs = neighbourhood(half, wide)
    want = narrowed(inputs.astype("f8"), half, modifiers)
    assert (run(emulator, conversion, inputs) == want).all()
    if modifiers == "rn" and wide == "f32":  # checks `narrowed` itself
        dtype = torch.float16 if half == "f16" else torch.bfloat16
        bits = torch.from_numpy(inputs).to(dtype).view(torch.int16).numpy().view("u2")
        assert (want == np.where(np.isnan(inputs), 0x7FFF, bits)).all()


@pytest.mark.parametrize("conversion", chosen("f16x2", "bf16x2", source=("f32",)), ids="-".join)
def test_narrowing_pairs(emulator, conversion):
    pair, _, modifiers = conversion
    high = neighbourhood(pair[:-2], "f32")
    low = np.roll(high, 12345)
    result = run(emulator, conversion, high, low)
    assert (result >> 16 == narrowed(high.astype("f8"), pair[:-2], modifiers)).all()
    assert (result & 0xFFFF == narrowed(low.astype("f8"), pair[:-2], modifiers)).all()


@pytest.mark.parametrize("conversion", chosen(*INTS, source=HALVES), ids="-".join)
def test_every_half_to_integers(emulator, conversion):
    kind, half, mode = conversion
    bits = int(kind[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)
    missing = 2**63 if bits == 64 else 0
    with np.errstate(invalid="ignore"):
        x = WHOLE[mode](decode(BITS, half))
    want = [
        missing if v != v else low if v < low else high if v > high else int(v) for v in x.tolist()
    ]
    assert run(emulator, conversion, BITS).tolist() == want


@pytest.mark.parametrize("conversion", chosen(*HALVES, source=INTS), ids="-".join)
def test_integers_to_halves(emulator, conversion):
    half, kind, mode = conversion
    if kind[1:] == "16":
        inputs = BITS.view(KINDS[kind][3])
    else:  # next to every half and every middle between halves that float64 can represent
        points = neighbourhood(half, "f64")
        points = points[np.abs(points) < 2.0 ** (31 if kind == "s32" else 53)]
        points = points[points >= 0] if kind[0] == "u" else points
        whole = np.unique(np.floor(points).astype("i8"))
        inputs = np.concatenate([whole, whole + 1]).astype(KINDS[kind][3])
    want = narrowed(inputs.astype("f8"), half, mode)
    assert (run(emulator, conversion, inputs) == want).all()
