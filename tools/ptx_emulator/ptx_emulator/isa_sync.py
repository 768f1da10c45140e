"""Where threads wait for each other: barriers of blocks and clusters, mbarriers, fences."""

from __future__ import annotations

from ptx_emulator.parser import Address, Pair
from ptx_emulator.site import Site, cpp_bool

_SCOPES = ("cta", "cluster", "gpu", "sys")
_SHARED = ("shared", "shared::cluster")


def barrier(site: Site) -> str:
    if site.has("warp"):
        site.only("warp", "sync")
        return f"warp_sync(t, W_SYNC, {site.argument(0, 'u32')}, {site.line});"
    if site.has("cluster"):
        return _cluster_barrier(site)
    site.only("cta", "sync", "arrive", "red", "popc", "and", "or", "aligned")
    kind = site.one("sync", "arrive", "red")
    first = 1 if kind == "red" else 0
    last = len(site.operands) - (1 if kind == "red" else 0)
    number = site.argument(first, "u32")
    count = site.argument(first + 1, "u32") if last > first + 1 else "0"
    if kind != "red":
        wait = cpp_bool(kind == "sync")
        return f"barrier_(t, {number}, {count}, {wait}, false, {site.line});"
    operation = site.one("popc", "and", "or")
    vote = site.value(site.operands[-1], "bool")
    code = f"u32 votes = barrier_(t, {number}, {count}, true, {vote}, {site.line});"
    everybody = f"(({count}) ? ({count}) : t.place->count)"
    result = {"popc": "votes", "or": "votes != 0", "and": f"votes == {everybody}"}[operation]
    return code + site.assign(
        site.operands[0], f"({'u32' if operation == 'popc' else 'bool'})({result})"
    )


def _cluster_barrier(site: Site) -> str:
    if site.has("arrive"):
        site.only("cluster", "arrive", "release", "relaxed", "aligned")
        return f"cluster_arrive(t, {cpp_bool(not site.has('relaxed'))}, {site.line});"
    site.only("cluster", "wait", "acquire", "aligned")
    site.one("wait")
    return f"cluster_wait(t, {site.line});"


# ---- mbarrier


def mbarrier(site: Site) -> str:
    operation = site.modifiers[0] if site.modifiers else ""
    if operation not in _MBARRIER:
        raise site.unsupported()
    return _MBARRIER[operation](site)


def _address_at(site: Site) -> int:
    for i, operand in enumerate(site.operands):
        if isinstance(operand, Address):
            return i
    raise site.unsupported("expected an address")


def _init(site: Site) -> str:
    site.only("init", "shared")
    return f"mbarrier_init(t, {site.address(0)}, {site.argument(1, 'u32')}, {site.line});"


def _invalidate(site: Site) -> str:
    site.only("inval", "shared")
    return f"mbarrier_invalidate(t, {site.address(0)}, {site.line});"


def _arrive(site: Site) -> str:
    site.only(
        *("arrive", "arrive_drop", "expect_tx", "noComplete", "release", "relaxed"),
        *("cta", "cluster", *_SHARED),
    )
    flags = [
        name
        for modifier, name in (
            ("arrive_drop", "ARRIVE_DROP"),
            ("relaxed", "ARRIVE_RELAXED"),
            ("noComplete", "ARRIVE_INCOMPLETE"),
        )
        if site.has(modifier)
    ]
    at = _address_at(site)
    amount = site.argument(at + 1, "u32") if len(site.operands) > at + 1 else "1"
    count, announced = ("1", amount) if site.has("expect_tx") else (amount, "0")
    call = f"mbarrier_arrive(t, {site.address(at)}, {count}, {announced}, "
    call += f"{' | '.join(flags) or '0'}, {site.line})"
    return site.assign(site.operands[0], call) if at else f"{call};"


def _transaction(site: Site) -> str:
    site.only("expect_tx", "complete_tx", "relaxed", "cta", "cluster", *_SHARED)
    sign = "-" if site.has("complete_tx") else ""
    amount = f"{sign}(s64){site.argument(1, 'u32')}"
    return f"mbarrier_transaction(t, {site.address(0)}, {amount}, {site.line});"


def _wait(site: Site) -> str:
    site.only("test_wait", "try_wait", "parity", "acquire", "relaxed", "cta", "cluster", "shared")
    parity, acquires = cpp_bool(site.has("parity")), cpp_bool(not site.has("relaxed"))
    value = site.argument(2, "u32" if site.has("parity") else "u64")
    call = f"mbarrier_wait(t, {site.address(1)}, {value}, {parity}, {acquires}, {site.line})"
    return site.assign(site.operands[0], call)


def _pending_count(site: Site) -> str:
    site.only("pending_count")
    return site.assign(site.operands[0], f"(u32){site.argument(1, 'u64')}")


_MBARRIER = {
    "init": _init,
    "inval": _invalidate,
    "arrive": _arrive,
    "arrive_drop": _arrive,
    "expect_tx": _transaction,
    "complete_tx": _transaction,
    "test_wait": _wait,
    "try_wait": _wait,
    "pending_count": _pending_count,
}


# ---- fences and the rest


def fence(site: Site) -> str:
    """Memory is coherent here, so that only the fence between the two proxies does something."""
    if site.has("proxy"):
        site.only("proxy", "async", "alias", "global", *_SHARED)
        return "fence_async_proxy(t);" if site.has("async") else ";"
    orders = ("acq_rel", "sc", "acquire", "release", "mbarrier_init")
    site.only(*orders, *_SCOPES)
    return ";"


def elect(site: Site) -> str:
    """The lowest lane of the mask is the one."""
    site.only("sync")
    mask, target = site.argument(1, "u32"), site.operands[0]
    lane, chosen = target.items if isinstance(target, Pair) else (target, None)
    code = f"u32 mask = {mask}; vote_(t, W_ANY, 1, mask, {site.line});"
    code += "u32 leader = __builtin_ctz(mask);" + site.assign(lane, "leader")
    return code + (site.assign(chosen, "t.lane == leader") if chosen is not None else "")


def grid_dependency(site: Site) -> str:
    """A launch runs alone: what it depends on is over, what depends on it comes later."""
    site.only("launch_dependents", "wait")
    return ";"


def register_count(site: Site) -> str:
    """Registers are not limited here."""
    site.only("inc", "dec", "sync", "aligned")
    return ";"


def sleep(site: Site) -> str:
    site.only()
    return "yield_(t);"
