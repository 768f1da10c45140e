"""Worker processes of a DataLoader: their start, signals and end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

_PR_SET_PDEATHSIG = 1  # linux/prctl.h: signal to send when the forking thread ends


def worker_options(workers: int) -> dict[str, Any]:
    """Returns the DataLoader arguments for `workers`; call it in the thread that iterates.

    A process forked while DALI's threads run can deadlock on a lock that one of them held. If DALI
    is imported, the workers are therefore forked from a clean server process.
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
    """Initializes a worker process: ignores stop signals, and uses one thread.

    Ctrl-C and SIGTERM can reach all processes of a terminal, session or control group. The main
    process needs its workers until it has stopped, and then ends them itself. Workers also end if
    the main process is gone.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited by new threads
    inherited = _temporary_folder()
    threading.Thread(target=_end_on_sigterm_of, args=(parent.pid, inherited), daemon=True).start()
    if end_with_thread and parent.pid == os.getppid():
        # A forked worker holds its rank's sockets open, so other ranks would wait for a killed rank
        # until its workers end; torch polls every 5 s. The parent counts as the signal's sender.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if parent.pid != os.getppid():  # the parent ended before the call
            os._exit(1)
    else:
        # The forking thread can end before its process. A server process, which torch takes for
        # the parent, lives as long as its workers.
        end_with_parent()
    torch.set_num_threads(1)


def end_with_parent() -> None:
    """Ends this child process as soon as its parent process has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent, _temporary_folder()), daemon=True).start()


def _end_on_sigterm_of(parent: int, inherited: str | None) -> None:
    """Ends the worker on a SIGTERM from the parent: Python and torch end workers with it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    _exit(0, inherited)


def _end_with(parent: BaseProcess, inherited: str | None) -> None:
    parent.join()
    _exit(1, inherited)


def _temporary_folder() -> str | None:
    """Returns the folder of this process's sockets, through which it passes shared memory."""
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    return config.get("tempdir")


def _exit(code: int, inherited: str | None) -> None:
    """Ends the process at once, and removes its temporary folder, but not that of its parent."""
    folder = _temporary_folder()
    if folder is not None and folder != inherited:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


def shut_down_workers(loader: DataLoader[Any]) -> None:
    """Ends a DataLoader's persistent workers.

    DataLoader has no public call for this. It relies on garbage collection, which is late if an
    exception's traceback still refers to the iterator.
    """
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None:
        iterator._shutdown_workers()  # type: ignore[attr-defined]


def is_worker_error(error: RuntimeError) -> bool:
    """Checks whether the error reports a dead DataLoader worker.

    torch raises it in a signal handler, so it can surface at any line of the main process.
    """
    return "DataLoader worker" in str(error)
