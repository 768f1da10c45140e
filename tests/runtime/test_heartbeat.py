"""Ranks started by hand: a lost one ends the others in a bounded time, and a busy one does not."""

from __future__ import annotations

import signal
import time

import pytest

from tests.forking import Forked, Server

# No rank waits for another one in a collective: only the heartbeat can notice the loss.
WORK = """
import os, sys, time
import torch
from featkd.cli.errors import described
from featkd.runtime import distributed
try:
    with distributed.joined("cpu") as context:
        print("joined", flush=True)
        end = time.monotonic() + float(sys.argv[2 + context.rank])
        while time.monotonic() < end:
            time.sleep(0.01) if sys.argv[1] == "idle" else sum(range(1_000_000))
        print("done", flush=True)
except Exception as error:
    message, code = described(error)
    sys.exit(f"featkd: {message}")
"""
QUICK = {"FEATKD_LOST_SECONDS": "2.4"}


def start(server: Server, how: str, *seconds: float) -> list[Forked]:
    ranks = server.ranks(len(seconds), how, *seconds, script=WORK, env=QUICK)
    deadline = time.monotonic() + 60
    while not all("joined" in rank.stdout for rank in ranks):
        assert time.monotonic() < deadline, [rank.stderr for rank in ranks]
        time.sleep(0.02)
    return ranks


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_named_and_ends_the_others(server: Server, lost: int, how: int) -> None:
    """Rank 0 serves the store through which the others would learn of a loss."""
    ranks = start(server, "idle", 60, 60, 60)
    ranks[lost].kill(how)
    began = time.monotonic()
    causes = {"process ended"}
    if how == signal.SIGSTOP:
        causes = {"no sign of life for 2.4 s", "its store has not answered for 2.4 s"}
    for rank in ranks:
        if rank is not ranks[lost]:
            assert rank.wait(20) == 1
            assert f"featkd: lost rank {lost} (process {ranks[lost].pid} on host " in rank.stderr
            assert any(cause in rank.stderr for cause in causes)
    assert time.monotonic() - began < 15
    if how == signal.SIGSTOP:
        ranks[lost].kill()


def test_busy_ranks_and_ranks_that_have_done_their_part_are_not_lost(server: Server) -> None:
    ranks = start(server, "busy", 0, 5)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    assert [rank.stdout for rank in ranks] == ["joined\ndone\n"] * 2


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_join_is_named(server: Server, missing: int) -> None:
    ranks = server.ranks(
        2, "idle", 0, 0, script=WORK, env={"FEATKD_JOIN_SECONDS": "1"}, only=1 - missing
    )
    assert ranks[0].wait(20) == 1
    expected = (
        "rank 0 did not start, or can't be reached: no answer from 127.0.0.1:",
        "rank 1 of 2 did not join within 1 s",
    )
    assert expected[missing] in ranks[0].stderr
    assert "Traceback" not in ranks[0].stderr


@pytest.mark.parametrize(
    ("name", "value"), [("FEATKD_LOST_SECONDS", "0"), ("FEATKD_JOIN_SECONDS", "soon")]
)
def test_unusable_seconds_are_refused(server: Server, name: str, value: str) -> None:
    (rank,) = server.ranks(2, "idle", 0, 0, script=WORK, env={name: value}, only=0)
    assert rank.wait(20) == 1
    assert f"{name}: expected a positive number of seconds, got '{value}'" in rank.stderr
