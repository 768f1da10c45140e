"""Process group of a run: started by torchrun, or a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class ProcessContext:
    """This process's place among those of the run (`rank` is a process, never a matrix's)."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """Group of CPU messages, which wait for no device, and a day for each other; None is the
    default group."""
    job: str | None = None
    """torchrun's id of the job, the same after a restart; None where it has none of its own."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def any_true(self, flag: bool) -> bool:
        """Whether `flag` is set in any process; all processes must call it at the same point."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def merged(self, facts: dict[str, str]) -> dict[str, str]:
        """The facts of all processes; all must call it at the same point."""
        return {key: value for part in self.all_gather(facts) for key, value in part.items()}

    def all_gather(self, value: object) -> list[Any]:
        """The values of all processes, by rank, on all of them."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def gather(self, value: object) -> list[Any]:
        """The values of all processes, by rank, on process 0, and nothing on the others."""
        if self.world_size == 1:
            return [value]
        found: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, found, group=self.control)
        return found or []

    def broadcast(self, value: object) -> Any:
        """Process 0's value, on all of them."""
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, group=self.control)
        return held[0]

    def sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over all processes, as a new tensor; all must call it at the same point."""
        total = x.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


class ProcessLost(RuntimeError):
    """Another process of the run has ended, so that this one can't go on."""


@contextmanager
def naming_lost_processes(remedy: str) -> Iterator[None]:
    """Say in one line what the network says at length when another process ends.

    Args:
        remedy: what the user can do, for the message.

    Raises:
        ProcessLost: a collective failed.
    """
    try:
        yield
    except RuntimeError as error:
        # From a backward pass comes gloo's error as it is, without a class of its own.
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise ProcessLost(
                "another process of the run has ended, or its node can't be reached; "
                f"{remedy} ({str(error).splitlines()[0]})"
            ) from error
        raise


def start(device: str = "auto") -> ProcessContext:
    """Join the process group that torchrun describes in the environment, if any.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"; under torchrun "cuda"
            is this process's own, by LOCAL_RANK.

    Raises:
        ValueError: an unknown device, CUDA asked for where there is none, or restarts on several
            nodes without what they need.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    place = _resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")), world_size)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    control = None
    if world_size > 1 and not dist.is_initialized():
        store, rank, world_size = _rendezvous()
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if world_size > 1:
        # Process 0 hashes a checkpoint or a million files' sizes while the others wait. One that
        # has ended is noticed at once, however long this is.
        control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's word where none was given
    return ProcessContext(rank, world_size, place, control, None if job == "none" else job)


def _rendezvous() -> tuple[Store, int, int]:
    """The store where the processes find each other, this one's rank, and their number.

    torchrun keeps one store for all of a job's restarts, although torch takes it for a new one
    each time (2.14's `_create_c10d_store` says so): processes that are started again read the
    addresses of those that are gone, and wait, or fail. On one node its count of restarts tells
    them apart. Nodes count for themselves, so that there torchrun has to be told.

    Raises:
        ValueError: several nodes are to be started again with one store.
    """
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if several and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun --max-restarts: {restarts} on several nodes needs "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment on each of them; "
            "without it processes that are started again wait for those that are gone"
        )
    store, rank, world_size = next(rendezvous("env://"))
    attempt = "0" if several else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"featkd/{attempt}", store), rank, world_size


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _resolve_device(device: str, local_rank: int, world_size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {device!r}") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {device!r}")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: {device!r} asked for, but torch sees no CUDA device")
        if place.index is None or world_size > 1:
            place = torch.device("cuda", local_rank)
    return place
