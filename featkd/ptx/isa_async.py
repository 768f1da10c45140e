"""Asynchronous copies: those of threads, and bulk copies."""

from __future__ import annotations

import re

from featkd.ptx.parser import Address, Immediate
from featkd.ptx.site import Site, cpp_bool


def copy_async(site: Site) -> str:
    if not site.modifiers or site.modifiers[0] != "async" or site.has("tensor"):
        raise site.unsupported()
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
    filled = site.argument(3, "u32") if len(site.operands) > 3 else str(size.bits)
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
