"""Asynchronous copies: `cp.async`, bulk copies, and copies of boxes of tensors."""

from __future__ import annotations

import re

from ptx_emulator.operation import Operation, cpp_bool
from ptx_emulator.parser import Address, Immediate, TensorAddress

_ON_MBARRIER = "mbarrier::complete_tx::bytes"


def copy_async(op: Operation) -> str:
    """Translates `cp.async`."""
    if not op.modifiers or op.modifiers[0] != "async":
        raise op.unsupported()
    if op.has("tensor"):
        return _tensor(op)
    if op.has("bulk"):
        return _bulk(op)
    if op.has("mbarrier"):
        op.allow("async", "mbarrier", "arrive", "noinc", "shared")
        counted = cpp_bool(op.has("noinc"))
        return f"mbarrier_track_copies(t, {op.address(0)}, {counted}, {op.line});"
    if op.has("commit_group"):
        op.allow("async", "commit_group")
        return "t.copy_group++;"
    if op.has("wait_group"):
        op.allow("async", "wait_group")
        left = op.operands[0]
        if not isinstance(left, Immediate):
            raise op.unsupported("operand form")
        return f"finish_copies(t, {left.bits});"
    if op.has("wait_all"):
        op.allow("async", "wait_all")
        return "t.copy_group++; finish_copies(t, 0);"
    hints = [m for m in op.modifiers if re.fullmatch(r"L2::\d+B", m)]
    op.allow("async", "ca", "cg", "shared", "global", *hints)
    size = op.operands[2]
    if not isinstance(size, Immediate) or size.bits not in (4, 8, 16):
        raise op.unsupported("copy size")
    filled = str(size.bits)
    if len(op.operands) > 3:
        last = op.operands[3]
        # read as a bool, a register keeps its type, by which async_copy_bytes detects a predicate
        read = op.value(last, "u32" if isinstance(last, Immediate) else "bool")
        filled = f"async_copy_bytes({size.bits}, {read})"
    return (
        f"copy_async(t, {op.address(0)}, {op.address(1)}, {size.bits}, {filled}, "
        f"{op.line}, {op.access_sites(2)});"
    )


def _bulk(op: Operation) -> str:
    """Translates `cp.async.bulk`."""
    if op.has("commit_group"):
        op.allow("async", "bulk", "commit_group")
        return "t.store_group++;"
    if op.has("wait_group"):
        op.allow("async", "bulk", "wait_group", "read")
        left = op.argument(0, "u32")
        return f"finish_stores(t, {left}, {cpp_bool(op.has('read'))});"
    if op.has("prefetch"):
        op.allow("async", "bulk", "prefetch", "L2", "global", "L2::cache_hint")
        return ";"
    spaces = [m for m in op.modifiers if m in ("global", "shared", "shared::cluster")]
    many = op.has("multicast::cluster")
    if op.has("bulk_group"):
        op.allow("async", "bulk", "bulk_group", *spaces, "L2::cache_hint")
    else:
        op.allow("async", "bulk", _ON_MBARRIER, *spaces, "multicast::cluster", "L2::cache_hint")
        op.one_of(_ON_MBARRIER)
    to, source, size = op.address(0), op.address(1), op.argument(2, "u32")
    if spaces == ["global", "shared"] and op.has("bulk_group"):
        return f"bulk_store(t, {to}, {source}, {size}, {op.line}, {op.access_sites()});"
    if (
        len(spaces) != 2
        or not spaces[0].startswith("shared")
        or not isinstance(op.operands[3], Address)
    ):
        raise op.unsupported("state spaces")
    rest = f"{op.address(3)}, {{mask}}{op.line}, {op.access_sites()});"
    if many:
        mask = f"{op.argument(4, 'u16')}, "
        return f"bulk_load_multicast(t, {to}, {source}, {size}, {rest.format(mask=mask)}"
    space = "GLOBAL" if spaces[1] == "global" else "SHARED"
    return f"bulk_load(t, {to}, {space}, {source}, {size}, {rest.format(mask='')}"


def _tensor(op: Operation) -> str:
    """Translates `cp.async.bulk.tensor`, without the modes im2col, gather and scatter."""
    rank = int(op.one_of(*(f"{n}d" for n in range(1, 6)))[0])
    if op.has("prefetch"):
        return ";"
    is_store = op.has("bulk_group")
    spaces = [m for m in op.modifiers if m in ("global", "shared", "shared::cluster")]
    kind = ("bulk_group",) if is_store else (_ON_MBARRIER, "multicast::cluster")
    op.allow("async", "bulk", "tensor", "tile", f"{rank}d", *spaces, *kind, "L2::cache_hint")
    if len(spaces) != 2 or (spaces[0] == "global") != is_store:
        raise op.unsupported("state spaces")
    tensor = op.operands[0 if is_store else 1]
    if not isinstance(tensor, TensorAddress) or len(tensor.at) != rank:
        raise op.unsupported("coordinates")
    at = ", ".join(op.value(x, "s32") for x in tensor.at)
    box = f"{op.address_of(tensor.map)}, {rank}, at"
    code = f"s32 at[5] = {{{at}}};"
    end = f"{op.line}, {op.access_sites()});"
    if is_store:
        return f"{code} tensor_store(t, {box}, {op.address(1)}, {end}"
    mask = op.argument(3, "u16") if op.has("multicast::cluster") else "0"
    return f"{code} tensor_load(t, {op.address(0)}, {box}, {op.address(2)}, {mask}, {end}"
