"""Asynchronous copies: those of threads, and bulk copies."""

from __future__ import annotations

import re

from ptx_emulator.parser import Address, Immediate, TensorAddress
from ptx_emulator.site import Site, cpp_bool


def copy_async(site: Site) -> str:
    if not site.modifiers or site.modifiers[0] != "async":
        raise site.unsupported()
    if site.has("tensor"):
        return _tensor(site)
    if site.has("bulk"):
        return _bulk(site)
    if site.has("mbarrier"):
        site.only("async", "mbarrier", "arrive", "noinc", "shared")
        counted = cpp_bool(site.has("noinc"))
        return f"mbarrier_track_copies(t, {site.address(0)}, {counted}, {site.line});"
    if site.has("commit_group"):
        site.only("async", "commit_group")
        return "t.copy_group++;"
    if site.has("wait_group"):
        site.only("async", "wait_group")
        left = site.operands[0]
        if not isinstance(left, Immediate):
            raise site.unsupported("operand form")
        return f"finish_copies(t, {left.bits});"
    if site.has("wait_all"):
        site.only("async", "wait_all")
        return "t.copy_group++; finish_copies(t, 0);"
    hints = [m for m in site.modifiers if re.fullmatch(r"L2::\d+B", m)]
    site.only("async", "ca", "cg", "shared", "global", *hints)
    size = site.operands[2]
    if not isinstance(size, Immediate) or size.bits not in (4, 8, 16):
        raise site.unsupported("copy size")
    filled = str(size.bits)
    if len(site.operands) > 3:
        last = site.operands[3]
        # as a bool a register keeps its type, which tells a predicate from a count
        read = site.value(last, "u32" if isinstance(last, Immediate) else "bool")
        filled = f"copied_bytes({size.bits}, {read})"
    return (
        f"copy_async(t, {site.address(0)}, {site.address(1)}, {size.bits}, {filled}, "
        f"{site.line}, {site.new_sites(2)});"
    )


_ON_MBARRIER = "mbarrier::complete_tx::bytes"


def _bulk(site: Site) -> str:
    if site.has("commit_group"):
        site.only("async", "bulk", "commit_group")
        return "t.store_group++;"
    if site.has("wait_group"):
        site.only("async", "bulk", "wait_group", "read")
        left = site.argument(0, "u32")
        return f"finish_stores(t, {left}, {cpp_bool(site.has('read'))});"
    if site.has("prefetch"):
        site.only("async", "bulk", "prefetch", "L2", "global", "L2::cache_hint")
        return ";"
    ends = [m for m in site.modifiers if m in ("global", "shared", "shared::cluster")]
    many = site.has("multicast::cluster")
    if site.has("bulk_group"):
        site.only("async", "bulk", "bulk_group", *ends, "L2::cache_hint")
    else:
        site.only("async", "bulk", _ON_MBARRIER, *ends, "multicast::cluster", "L2::cache_hint")
        site.one(_ON_MBARRIER)
    to, source, size = site.address(0), site.address(1), site.argument(2, "u32")
    if ends == ["global", "shared"] and site.has("bulk_group"):
        return f"bulk_store(t, {to}, {source}, {size}, {site.line}, {site.new_sites()});"
    if (
        len(ends) != 2
        or not ends[0].startswith("shared")
        or not isinstance(site.operands[3], Address)
    ):
        raise site.unsupported("state spaces")
    rest = f"{site.address(3)}, {{mask}}{site.line}, {site.new_sites()});"
    if many:
        mask = f"{site.argument(4, 'u16')}, "
        return f"bulk_load_many(t, {to}, {source}, {size}, {rest.format(mask=mask)}"
    space = "GLOBAL" if ends[1] == "global" else "SHARED"
    return f"bulk_load(t, {to}, {space}, {source}, {size}, {rest.format(mask='')}"


def _tensor(site: Site) -> str:
    """Tiles of tensors; `im2col` and the modes of gather and scatter are not there."""
    rank = int(site.one(*(f"{n}d" for n in range(1, 6)))[0])
    if site.has("prefetch"):
        return ";"
    is_store = site.has("bulk_group")
    ends = [m for m in site.modifiers if m in ("global", "shared", "shared::cluster")]
    kind = ("bulk_group",) if is_store else (_ON_MBARRIER, "multicast::cluster")
    site.only("async", "bulk", "tensor", "tile", f"{rank}d", *ends, *kind, "L2::cache_hint")
    if len(ends) != 2 or (ends[0] == "global") != is_store:
        raise site.unsupported("state spaces")
    tensor = site.operands[0 if is_store else 1]
    if not isinstance(tensor, TensorAddress) or len(tensor.at) != rank:
        raise site.unsupported("coordinates")
    at = ", ".join(site.value(x, "s32") for x in tensor.at)
    box = f"{site.place(tensor.map)}, {rank}, at"
    code = f"s32 at[5] = {{{at}}};"
    end = f"{site.line}, {site.new_sites()});"
    if is_store:
        return f"{code} tensor_store(t, {box}, {site.address(1)}, {end}"
    mask = site.argument(3, "u16") if site.has("multicast::cluster") else "0"
    return f"{code} tensor_load(t, {site.address(0)}, {box}, {site.address(2)}, {mask}, {end}"
