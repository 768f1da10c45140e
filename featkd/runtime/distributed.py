"""Process group of a run: of ranks that torchrun, a scheduler or a user starts, or one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from featkd.runtime.heartbeat import Heartbeat, ProcessLost, connect

Result = TypeVar("Result")

_heartbeat: Heartbeat | None = None  # of the process group that `start` has joined


@dataclass(frozen=True)
class ProcessContext:
    """Rank, world size and device of this process."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """gloo group for messages on the CPU, with a timeout of one day; None: the default group."""
    job: str | None = None
    """torchrun's id of the job, kept across restarts; None if torchrun was given none."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the files and prints."""
        return self.rank == 0

    def any_true(self, flag: bool) -> bool:
        """Returns True if `flag` is set on any rank; a collective."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def merge_dicts(self, own: dict[str, str]) -> dict[str, str]:
        """Merges the dictionaries of all ranks; a collective."""
        return {key: value for part in self.all_gather(own) for key, value in part.items()}

    def all_gather(self, value: object) -> list[Any]:
        """Returns the values of all ranks, in order of rank; a collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather(self, value: object) -> list[Any]:
        """Returns the values of all ranks on rank 0, and an empty list elsewhere; a collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, group=self.control)
        return values or []

    def broadcast(self, value: object) -> Any:
        """Returns the value of rank 0 on all ranks; a collective."""
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, group=self.control)
        return held[0]

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Calls `work` on rank 0; all ranks return its result or raise its error; a collective."""
        outcome: tuple[Any, Exception | None] = None, None
        if self.is_main:
            try:
                outcome = work(), None
            except Exception as error:
                outcome = None, error
        result, failed = self.broadcast(outcome)
        if failed is not None:
            raise failed
        return cast(Result, result)

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of `x` over all ranks, as a new tensor; a collective."""
        total = x.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def explain_lost_processes(remedy: str) -> Iterator[None]:
    """Replaces the errors of a failed collective by a ProcessLost with a short message.

    Args:
        remedy: advice for the user, part of the message.

    Raises:
        ProcessLost: a collective failed.
    """
    if _heartbeat is not None:
        _heartbeat.remedy = remedy
    try:
        yield
    except RuntimeError as error:
        # In a backward pass, gloo's error is a plain RuntimeError.
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            lost = "" if _heartbeat is None else _heartbeat.describe_lost()
            lost = lost or "another process of the run has ended, or its node can't be reached"
            raise ProcessLost(f"{lost}; {remedy} ({str(error).splitlines()[0]})") from error
        raise


@contextmanager
def joined(device: str = "auto") -> Iterator[ProcessContext]:
    """Joins the process group of the environment (see `start`), and leaves it at the end.

    At the end each rank waits for the others, unless it has failed.
    """
    global _heartbeat
    was_joined = dist.is_initialized()
    context = start(device)
    failed = True
    try:
        yield context
        failed = False
    finally:
        if dist.is_initialized() and not was_joined:
            if not failed:
                with suppress(RuntimeError):  # a rank that has failed says so itself
                    dist.barrier(group=context.control)
            if _heartbeat is not None:
                _heartbeat.stop(left=not failed)
                _heartbeat = None
            dist.destroy_process_group()


def start(device: str = "auto") -> ProcessContext:
    """Joins the process group that the environment describes as torchrun does, if any.

    Args:
        device: "auto" (CUDA if available), "cpu", "cuda" or "cuda:N". With several ranks, a CUDA
            device is chosen by LOCAL_RANK.

    Raises:
        ValueError: the device is unknown, CUDA is not available, a variable is missing, or torchrun
            restarts processes on several nodes without the required environment variable.
        ProcessLost: a rank does not join in time, or is lost meanwhile.
    """
    global _heartbeat
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = _resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")), world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    control = None
    if world_size > 1:
        with explain_lost_processes("start all ranks again"):
            if not dist.is_initialized():
                store = _rendezvous(rank)
                _heartbeat = Heartbeat(store, rank, world_size)
                backend = "nccl" if chosen.type == "cuda" else "gloo"
                try:
                    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
                except BaseException:
                    _heartbeat.stop(left=False)
                    raise
            # Rank 0 can take long to hash a checkpoint or a million file sizes while the others
            # wait. The heartbeat notices a process that has ended, whatever the timeout.
            control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's default
    return ProcessContext(rank, world_size, chosen, control, None if job == "none" else job)


def _rendezvous(rank: int) -> Store:
    """Returns the store for the rendezvous.

    torchrun keeps one store for all restarts of a job. A restarted process would read the addresses
    of the processes that have ended, and hang or fail. On one node, a prefix with torchrun's
    restart count separates the restarts. Each node counts its own restarts, so with several nodes
    torchrun must be told to make a new store.

    Raises:
        ValueError: a variable is missing, or torchrun restarts processes on several nodes with one
            store.
        ProcessLost: rank 0 can't be reached.
    """
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if several and restarts and agent_serves:
        raise ValueError(
            f"torchrun --max-restarts: {restarts} on several nodes needs "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment on each node; "
            "without it restarted processes wait for processes that have ended"
        )
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(
                f"{name}: expected a value, because WORLD_SIZE is {os.environ['WORLD_SIZE']}; "
                "start the ranks with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
                "and MASTER_PORT for each"
            )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = connect(host, port, rank, serve=rank == 0 and not agent_serves)
    attempt = "0" if several else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"featkd/{attempt}", store)


def _resolve_device(device: str, local_rank: int, world_size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = None
    with suppress(RuntimeError):
        resolved = torch.device(device)
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {device!r}")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device: got {device!r}, but torch finds no CUDA device; expected auto or cpu"
            )
        if resolved.index is None or world_size > 1:
            resolved = torch.device("cuda", local_rank)
    return resolved
