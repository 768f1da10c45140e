"""Synchronization of threads: barriers of blocks and clusters, mbarriers, fences."""

from __future__ import annotations

from ptx_emulator.operation import Operation, cpp_bool
from ptx_emulator.parser import Address, Pair

_SCOPES = ("cta", "cluster", "gpu", "sys")
_SHARED = ("shared", "shared::cluster")


def barrier(op: Operation) -> str:
    """Translates `bar` and `barrier`, of a block, a warp or a cluster."""
    if op.has("warp"):
        op.allow("warp", "sync")
        return f"warp_sync(t, W_SYNC, {op.argument(0, 'u32')}, {op.line});"
    if op.has("cluster"):
        return _cluster_barrier(op)
    op.allow("cta", "sync", "arrive", "red", "popc", "and", "or", "aligned")
    kind = op.one_of("sync", "arrive", "red")
    first = 1 if kind == "red" else 0
    last = len(op.operands) - (1 if kind == "red" else 0)
    number = op.argument(first, "u32")
    count = op.argument(first + 1, "u32") if last > first + 1 else "0"
    if kind != "red":
        wait = cpp_bool(kind == "sync")
        return f"barrier_(t, {number}, {count}, {wait}, false, {op.line});"
    operation = op.one_of("popc", "and", "or")
    vote = op.value(op.operands[-1], "bool")
    code = f"u32 votes = barrier_(t, {number}, {count}, true, {vote}, {op.line});"
    all_threads = f"(({count}) ? ({count}) : t.position->count)"
    result = {"popc": "votes", "or": "votes != 0", "and": f"votes == {all_threads}"}[operation]
    return code + op.assign(
        op.operands[0], f"({'u32' if operation == 'popc' else 'bool'})({result})"
    )


def _cluster_barrier(op: Operation) -> str:
    if op.has("arrive"):
        op.allow("cluster", "arrive", "release", "relaxed", "aligned")
        return f"cluster_arrive(t, {cpp_bool(not op.has('relaxed'))}, {op.line});"
    op.allow("cluster", "wait", "acquire", "aligned")
    op.one_of("wait")
    return f"cluster_wait(t, {op.line});"


# ---- mbarrier


def mbarrier(op: Operation) -> str:
    """Translates `mbarrier`."""
    operation = op.modifiers[0] if op.modifiers else ""
    if operation not in _MBARRIER:
        raise op.unsupported()
    return _MBARRIER[operation](op)


def _address_at(op: Operation) -> int:
    for i, operand in enumerate(op.operands):
        if isinstance(operand, Address):
            return i
    raise op.unsupported("expected an address")


def _init(op: Operation) -> str:
    op.allow("init", "shared")
    return f"mbarrier_init(t, {op.address(0)}, {op.argument(1, 'u32')}, {op.line});"


def _invalidate(op: Operation) -> str:
    op.allow("inval", "shared")
    return f"mbarrier_invalidate(t, {op.address(0)}, {op.line});"


def _arrive(op: Operation) -> str:
    op.allow(
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
        if op.has(modifier)
    ]
    at = _address_at(op)
    amount = op.argument(at + 1, "u32") if len(op.operands) > at + 1 else "1"
    count, announced = ("1", amount) if op.has("expect_tx") else (amount, "0")
    call = f"mbarrier_arrive(t, {op.address(at)}, {count}, {announced}, "
    call += f"{' | '.join(flags) or '0'}, {op.line})"
    return op.assign(op.operands[0], call) if at else f"{call};"


def _transaction(op: Operation) -> str:
    op.allow("expect_tx", "complete_tx", "relaxed", "cta", "cluster", *_SHARED)
    sign = "-" if op.has("complete_tx") else ""
    amount = f"{sign}(s64){op.argument(1, 'u32')}"
    return f"mbarrier_transaction(t, {op.address(0)}, {amount}, {op.line});"


def _wait(op: Operation) -> str:
    op.allow("test_wait", "try_wait", "parity", "acquire", "relaxed", "cta", "cluster", "shared")
    parity, acquires = cpp_bool(op.has("parity")), cpp_bool(not op.has("relaxed"))
    value = op.argument(2, "u32" if op.has("parity") else "u64")
    call = f"mbarrier_wait(t, {op.address(1)}, {value}, {parity}, {acquires}, {op.line})"
    return op.assign(op.operands[0], call)


def _pending_count(op: Operation) -> str:
    op.allow("pending_count")
    return op.assign(op.operands[0], f"(u32){op.argument(1, 'u64')}")


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


# ---- fences and others


def fence(op: Operation) -> str:
    """Translates `fence`: memory is coherent, only the fence between the proxies has an effect."""
    if op.has("proxy"):
        op.allow("proxy", "async", "alias", "global", *_SHARED)
        return "fence_async_proxy(t);" if op.has("async") else ";"
    orders = ("acq_rel", "sc", "acquire", "release", "mbarrier_init")
    op.allow(*orders, *_SCOPES)
    return ";"


def elect(op: Operation) -> str:
    """Translates `elect`: the lowest lane of the mask is elected."""
    op.allow("sync")
    mask, target = op.argument(1, "u32"), op.operands[0]
    lane, chosen = target.items if isinstance(target, Pair) else (target, None)
    code = f"u32 mask = {mask}; vote_(t, W_ANY, 1, mask, {op.line});"
    code += "u32 leader = __builtin_ctz(mask);" + op.assign(lane, "leader")
    return code + (op.assign(chosen, "t.lane == leader") if chosen is not None else "")


def grid_dependency(op: Operation) -> str:
    """Translates `griddepcontrol`: launches run one after the other."""
    op.allow("launch_dependents", "wait")
    return ";"


def register_count(op: Operation) -> str:
    """Translates `setmaxnreg`: the emulator does not limit registers."""
    op.allow("inc", "dec", "sync", "aligned")
    return ";"


def sleep(op: Operation) -> str:
    """Translates `nanosleep`: the other threads run first."""
    op.allow()
    return "yield_(t);"
