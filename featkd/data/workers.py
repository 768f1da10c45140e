"""A DataLoader's worker processes: how they start, what they do not hear, and how they end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

_PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that follows on the end of the thread that forked


def worker_options(workers: int) -> dict[str, Any]:
    """Options of a DataLoader that the calling thread is about to iterate over.

    DALI has threads of its own, and a process forked beside them can wait for ever for a lock
    that one of them held (seen here); workers then come from a clean server process.
    """
    if workers == 0:
        return {"num_workers": 0}
    server = "nvidia.dali" in sys.modules
    if server:
        multiprocessing.set_forkserver_preload(["featkd.data.worker_server"])
    in_main_thread = threading.current_thread() is threading.main_thread()
    return {
        "num_workers": workers,
        "multiprocessing_context": "forkserver" if server else None,
        "worker_init_fn": partial(_start_worker, end_with_thread=in_main_thread and not server),
    }


def _start_worker(worker: int, *, end_with_thread: bool) -> None:
    """Begin in a worker process: deaf to what stops a run, and in one thread, as workers are many.

    Ctrl-C and SIGTERM reach every process of a terminal, a session or a control group. The main
    process needs its workers until it has stopped; it ends them itself, and they end when it is
    gone.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of the threads to come as well
    threading.Thread(target=_end_if_told, args=(parent.pid,), daemon=True).start()
    if end_with_thread and parent.pid == os.getppid():
        # At once, where torch looks every 5 s: a forked worker holds its rank's sockets open too,
        # so that the other ranks would wait for a killed one as long as its workers live.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        # The thread that forked it can end before the process does. A server process, which torch
        # takes for the parent, lives as long as its workers.
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)


def _end_if_told(parent: int) -> None:
    """End on a SIGTERM of the parent's own, which is how Python and torch end what goes on."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def end_workers(loader: DataLoader[Any]) -> None:
    """End a DataLoader's persistent workers.

    It has no public call for it, and leaves it to the garbage collector, which comes late where an
    exception's traceback still holds the iterator.
    """
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None:
        iterator._shutdown_workers()  # type: ignore[attr-defined]


def is_of_worker(error: RuntimeError) -> bool:
    """Whether it says that a loader's worker has died; torch raises it out of a signal handler,
    that is wherever the main process just is."""
    return "DataLoader worker" in str(error)
