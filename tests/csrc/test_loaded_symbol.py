"""Lookup of functions in libraries that torch loads with RTLD_LOCAL, such as its CUDA library."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from featkd.ops import extension
from tests.csrc.test_teams import compiler

SOURCE = """
extern "C" int stand_in_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<long>(1000 + device));
  return 0;
}
"""


def find(library: str, symbol: str) -> int | None:
    """Address that csrc finds, or None."""
    assert extension.missing() == ""
    lookup = ctypes.CDLL(str(extension.LIBRARY)).featkd_loaded_symbol
    lookup.restype, lookup.argtypes = ctypes.c_void_p, [ctypes.c_char_p] * 2
    found: int | None = lookup(library.encode(), symbol.encode())
    return found


def is_global(symbol: str) -> bool:
    """Checks whether RTLD_DEFAULT finds the symbol."""
    return hasattr(ctypes.CDLL(None), symbol)


def test_finds_function_in_library_loaded_with_rtld_local(tmp_path: Path):
    (tmp_path / "stand_in.cpp").write_text(SOURCE)
    target = tmp_path / "under_another_name.so"  # the lookup uses the soname, not the file name
    name = "libfeatkd_stand_in.so"
    command = [compiler(), "-shared", "-fPIC", f"-Wl,-soname,{name}", "stand_in.cpp"]
    subprocess.run([*command, "-o", str(target)], cwd=tmp_path, check=True)
    assert find(name, "stand_in_stream") is None
    ctypes.CDLL(str(target), mode=os.RTLD_LOCAL | os.RTLD_LAZY)
    assert not is_global("stand_in_stream")
    address = find(name, "stand_in_stream")
    assert address is not None
    stream = ctypes.c_void_p()
    ask = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))(address)
    assert ask(3, ctypes.byref(stream)) == 0
    assert stream.value == 1003
    assert find(name, "stand_in_of_nothing") is None


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA")
def test_finds_current_stream_function_of_torch():
    """`import torch` loads libtorch_cuda also without a GPU."""
    symbol = "aoti_torch_get_current_cuda_stream"
    assert not is_global(symbol)
    assert find("libtorch_cuda.so", symbol) is not None
