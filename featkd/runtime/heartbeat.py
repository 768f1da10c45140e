"""Signs of life between the ranks of a run: if one is lost, the others end and name it.

Collectives do not notice every loss: NCCL waits for minutes, gloo waits for a node without power.
Each rank therefore writes a growing number into the store of the rendezvous, and watches those of
the others, in threads that no training step waits for.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from featkd.runtime.names import listed, printable
from featkd.runtime.processes import machine, start_time

_JOIN_SECONDS = 300.0
_LOST_SECONDS = 60.0
_AGAIN = "start all ranks again"
_BEATS = 12  # within the time after which a rank is lost
_GONE = "process ended"
_ENDED = b"ended"  # beat of a rank that has left the run


class ProcessLost(RuntimeError):
    """Another process of the run has ended, so this one cannot continue."""


class _Process(NamedTuple):
    host: str
    pid: int
    machine: str
    start_time: str

    def is_gone(self) -> bool:
        """Checks if the process has ended; False if it is on another machine."""
        return self.machine == machine() and start_time(self.pid) != self.start_time


def seconds(name: str, default: float) -> float:
    """Returns a number of seconds from the environment.

    Raises:
        ValueError: it is not a positive number.
    """
    text = os.environ.get(name, "")
    with suppress(ValueError):
        if (value := float(text or default)) > 0:
            return value
    raise ValueError(f"{name}: expected a positive number of seconds, got {text!r}")


def connect(host: str, port: int, rank: int, *, serve: bool) -> TCPStore:
    """Connects to the store of the rendezvous.

    Args:
        host: name or address of the process that serves the store.
        port: its port.
        rank: this process's rank.
        serve: this process serves the store.

    Raises:
        ProcessLost: rank 0 does not answer there within FEATKD_JOIN_SECONDS.
        OSError: this process can't serve there, for example because the port is taken.
    """
    limit = seconds("FEATKD_JOIN_SECONDS", _JOIN_SECONDS)
    deadline = time.monotonic() + limit
    while not serve:  # torch would wait too, but not end on Ctrl-C
        try:
            socket.create_connection((host, port), timeout=limit).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ProcessLost(
                    f"rank {rank}: rank 0 did not start, or can't be reached: no answer from "
                    f"{host}:{port} (MASTER_ADDR:MASTER_PORT) within {limit:g} s "
                    f"(FEATKD_JOIN_SECONDS): {error}"
                ) from error
            time.sleep(0.1)
    try:
        return TCPStore(
            host,
            port,
            None,
            serve,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        if serve:
            cause = str(error).splitlines()[0]
            raise OSError(
                f"rank 0 can't serve at {host}:{port} (MASTER_ADDR:MASTER_PORT): {cause}; expected "
                "a free port of this host"
            ) from error
        raise _lost_before_joining(error) from error


class Heartbeat:
    """Tells the other ranks that this one runs, and ends this process if another is lost.

    A rank is lost if its process on this machine has ended, or after FEATKD_LOST_SECONDS without a
    sign of life. A rank that is busy, in Python or in a kernel, is not lost.

    Args:
        store: the store of the rendezvous.
        rank: this process's rank.
        world_size: number of ranks; the call waits for all of them.

    Attributes:
        remedy: advice for the user, the end of the message.

    Raises:
        ProcessLost: a rank has not joined within FEATKD_JOIN_SECONDS.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.remedy = _AGAIN
        self._limit = seconds("FEATKD_LOST_SECONDS", _LOST_SECONDS)
        # A connection of its own: calls on the other one can wait for minutes.
        self._store = PrefixStore("heartbeat", store.clone())
        self._rank = rank
        self._names = [f"beat/{number}" for number in range(world_size)]
        self._beats = [b"0"] * world_size
        self._exchanges = 0
        self._ended = threading.Event()
        self._processes = self._join()
        self._threads = [
            threading.Thread(target=target, daemon=True, name="featkd-heartbeat")
            for target in (self._exchange, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, *, left: bool) -> None:
        """Ends the threads.

        Args:
            left: this rank has done its part; the others do not miss it.
        """
        self._ended.set()
        self._threads[0].join(2)  # it would write another beat; it can wait for a lost store
        if left:
            with suppress(RuntimeError):  # the store has ended with rank 0
                self._store.set(self._names[self._rank], _ENDED.decode())

    def describe_lost(self, wait: float = 5.0) -> str:
        """Names the processes on this machine that have ended; "" if there are none.

        Args:
            wait: seconds to wait for one; a process closes its connections before it has ended.
        """
        deadline = time.monotonic() + wait
        while not (gone := self._gone()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._named(gone, _GONE) if gone else ""

    def _join(self) -> list[_Process]:
        """Waits for all ranks; returns their processes."""
        own = (socket.gethostname(), str(os.getpid()), machine(), start_time(os.getpid()))
        names = [f"process/{rank}" for rank in range(len(self._names))]
        limit = seconds("FEATKD_JOIN_SECONDS", _JOIN_SECONDS)
        deadline = time.monotonic() + limit
        try:
            self._store.set(self._names[self._rank], "0")
            self._store.set(names[self._rank], "\n".join(own))
            while not self._store.check(names):
                if time.monotonic() > deadline:
                    missing = [r for r, name in enumerate(names) if not self._store.check([name])]
                    raise ProcessLost(
                        f"{_ranks(missing)} of {len(names)} did not join within {limit:g} s "
                        f"(FEATKD_JOIN_SECONDS); {_AGAIN}"
                    )
                time.sleep(0.05)
            found = [value.decode().split("\n") for value in self._store.multi_get(names)]
        except dist.DistError as error:
            raise _lost_before_joining(error) from error
        return [_Process(host, int(pid), place, begun) for host, pid, place, begun in found]

    def _exchange(self) -> None:
        """Writes this rank's beats and reads those of the others."""
        count = 0
        while not self._ended.wait(self._limit / _BEATS):
            count += 1
            if self._processes[0].is_gone():  # torch would print a stack trace
                return
            with suppress(RuntimeError):  # `_watch` sees that the exchanges stop
                self._store.set(self._names[self._rank], str(count))
                self._beats = self._store.multi_get(self._names)
                self._exchanges += 1

    def _watch(self) -> None:
        """Counts its own rounds, not time: all ranks may be suspended together."""
        seen, silent_store = 0, 0
        beats, silent = self._beats, [0] * len(self._names)
        gone: list[int] = []
        while not self._ended.wait(self._limit / _BEATS):
            silent_store += 1
            if (exchanges := self._exchanges) != seen:
                seen, silent_store = exchanges, 0
                beats, before = self._beats, beats
                for rank, (now, then) in enumerate(zip(beats, before, strict=True)):
                    silent[rank] = 0 if now != then or now == _ENDED else silent[rank] + 1
            # Confirmed in a second round: a rank can end before its last beat has been read.
            before_gone, gone = gone, self._gone()
            confirmed = [rank for rank in gone if rank in before_gone]
            lost = [rank for rank, rounds in enumerate(silent) if rounds > _BEATS]
            if confirmed:
                self._end(confirmed, _GONE, wait=3)
            elif lost:
                self._end(lost, f"no sign of life for {self._limit:g} s", wait=6)
            elif silent_store > _BEATS and beats[0] != _ENDED:
                self._end([0], f"its store has not answered for {self._limit:g} s", wait=6)

    def _gone(self) -> list[int]:
        beats = self._beats
        return [
            rank
            for rank, process in enumerate(self._processes)
            if beats[rank] != _ENDED and process.is_gone()
        ]

    def _named(self, ranks: list[int], cause: str) -> str:
        if len(ranks) > 1:
            return f"lost {_ranks(ranks)} of {len(self._names)}: {cause}"
        process = self._processes[ranks[0]]
        return f"lost rank {ranks[0]} (process {process.pid} on host {process.host}): {cause}"

    def _end(self, ranks: list[int], cause: str, wait: int) -> None:
        """Ends the process: its main thread may wait in a collective that nothing interrupts.

        Args:
            ranks: the lost ranks.
            cause: the reason, in words.
            wait: rounds to wait, so that the others find the same cause before they miss this rank.
        """
        message = f"{self._named(ranks, cause)}; {self.remedy}"
        if not self._ended.is_set():
            os.write(2, f"featkd: {printable(message)}\n".encode())
            if not self._ended.wait(wait * self._limit / _BEATS):
                os._exit(1)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks, 5)}"


def _lost_before_joining(error: Exception) -> ProcessLost:
    cause = str(error).splitlines()[0]
    return ProcessLost(f"lost rank 0 before all ranks had joined ({cause}); {_AGAIN}")
