"""Asynchronous copies."""

from __future__ import annotations

import re

from featkd.ptx.parser import Immediate
from featkd.ptx.site import Site, cpp_bool


def copy_async(site: Site) -> str:
    if not site.modifiers or site.modifiers[0] != "async" or site.has("bulk"):
        raise site.unsupported()
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
    filled = site.argument(3, "u32") if len(site.operands) > 3 else str(size.bits)
    return (
        f"copy_async(t, {site.address(0)}, {site.address(1)}, {size.bits}, {filled}, "
        f"{site.line}, {site.new_sites(2)});"
    )
