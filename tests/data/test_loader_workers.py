"""Worker processes: a dead one raises an error, and none outlives its run."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from featkd.data import Batch
from featkd.runtime.processes import start_time
from tests.data.conftest import MakeSet
from tests.data.loading import alive, loading
from tests.forking import Forked, Server


def test_more_workers_than_cores_are_noted_in_one_line(make_set: MakeSet) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        with loading(make_set(train=8), workers=2) as loader:
            next(iter(loader))
            note = "data.workers: 2 processes share 1 CPU core; try --data.workers 1"
            assert loader.note == note


def test_close_ends_the_workers_also_after_an_exception(make_set: MakeSet) -> None:
    with loading(make_set(train=40), workers=2) as loader:
        with contextlib.suppress(KeyError):
            for _ in loader:
                raise KeyError
        assert len(alive()) == 2
        loader.close()
        assert alive() == []
        loader.close()
        running = iter(loader)  # starts new workers
        next(running)
        assert len(alive()) == 2
        began = time.monotonic()
        loader.close()
        assert alive() == []
        assert time.monotonic() - began < 2
        with pytest.raises(RuntimeError, match="this one is over"):
            next(running)


def test_a_killed_worker_raises_an_error(make_set: MakeSet) -> None:
    with loading(make_set(train=400), workers=2) as loader:
        batches = iter(loader)
        next(batches)
        pid = alive()[0]
        assert pid is not None

        def kill_and_go_on() -> None:
            os.kill(pid, signal.SIGKILL)
            list(batches)

        with pytest.raises(RuntimeError, match="DataLoader worker"):
            kill_and_go_on()
    assert alive() == []


BESIDE = """
import multiprocessing, sys, time, types
from pathlib import Path
from featkd.data import DataConfig, build_loader
config = DataConfig(sys.argv[1], img_size=16, workers=1, backend="timm")
loaders = [build_loader(config, split="train", batch_size=4) for _ in range(2)]
running = []
for beside, loader in zip(("nothing", "nvidia.dali"), loaders):
    sys.modules[beside] = types.ModuleType(beside)
    running.append(iter(loader))
    next(running[-1])
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
print(*(len(list(batches)) for batches in running), flush=True)
time.sleep(60)
"""


def line(process: Forked, number: int) -> str:
    """Waits for line `number` of the output and returns it."""
    deadline = time.monotonic() + 60
    while process.stdout.count("\n") <= number:
        assert time.monotonic() < deadline, process.stderr
        time.sleep(0.01)
    return process.stdout.splitlines(keepends=True)[number]


def test_workers_run_until_their_rank_ends(
    make_set: MakeSet, server: Server, tmp_path: Path
) -> None:
    """Signals do not stop the workers; if their rank is killed, they end immediately.

    Covers workers forked from the rank, and from a server process once DALI is imported.
    """
    more = tmp_path / "more"
    process = server.start(make_set(train=40), more, script=BESIDE)
    (first,) = line(process, 0).split()
    workers = line(process, 1).split()
    (second,) = set(workers) - {first}
    second_parent = parent(second)
    assert parent(first) == process.pid != second_parent
    for pid in (int(first), int(second), second_parent):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    more.touch()
    assert line(process, 2) == "9 9\n"
    process.kill()
    wait_for_end(workers, 2)
    process.wait()


def test_only_the_server_process_ignores_sigterm() -> None:
    before = signal.getsignal(signal.SIGTERM)
    module = importlib.import_module("featkd.data.worker_server")  # as pytest does for doctests
    importlib.reload(module)
    assert signal.getsignal(signal.SIGTERM) == before != signal.SIG_IGN


def parent(process: str) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_terminated_worker_ends(make_set: MakeSet) -> None:
    """As Python does at exit, and torch for a worker that hangs."""
    with loading(make_set(train=40), workers=1) as loader:
        next(iter(loader))
        (worker,) = multiprocessing.active_children()
        worker.terminate()
        worker.join(2)
        assert not worker.is_alive()


def test_workers_outlive_the_thread_that_started_them(make_set: MakeSet) -> None:
    with loading(make_set(train=40), workers=1) as loader:
        started: list[Iterator[Batch]] = []

        def start() -> None:
            started.append(iter(loader))
            next(started[0])

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        time.sleep(0.1)  # long enough for a signal sent when the thread ends
        assert len(list(started[0])) == 9


def wait_for_end(processes: list[str], seconds: float) -> None:
    """Waits until none of the processes runs; a zombie does not."""
    deadline = time.monotonic() + seconds
    while processes:
        assert time.monotonic() < deadline, f"processes {processes} live on"
        processes = [pid for pid in processes if start_time(int(pid))]
        time.sleep(0.02)


ENDING = """
import multiprocessing, signal, sys, tempfile, time
tempfile.tempdir = sys.argv[3]
from featkd.data import DataConfig, build_loader
config = DataConfig(sys.argv[1], img_size=16, workers=2)
loader = build_loader(config, split="train", batch_size=4)
came = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it otherwise
if sys.argv[2] == "handled":
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
batches = iter(loader)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
if sys.argv[2] == "raise":
    raise KeyError("out of the loop")
while not came:
    time.sleep(0.01)
print(len(list(batches)), "more batches")
"""


@pytest.mark.parametrize("how", ["ctrl-c", "handled", "raise", "killed"])
def test_an_end_within_an_epoch_leaves_nothing(make_set: MakeSet, server: Server, how: str) -> None:
    """Ends without close(), and leaves no folder of the workers behind.

    A terminal's Ctrl-C reaches the whole process group. If the main process handles it (to save
    its state), the workers continue.
    """
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path has at most 107 characters
    process = server.start(make_set(train=256), how, str(temporary), script=ENDING)
    first = line(process, 0)
    assert list(temporary.glob("pymp-*"))
    workers = first.split()
    assert len(workers) == 2
    if how == "killed":
        process.kill()
    elif how != "raise":
        os.killpg(process.pid, signal.SIGINT)
    process.wait(30)
    errors = process.stderr
    if how == "handled":
        assert (process.returncode, process.stdout) == (0, f"{first}63 more batches\n"), errors
    elif how != "killed":
        assert process.returncode != 0
        assert errors.count("Traceback") == 1
        assert ("KeyboardInterrupt" if how == "ctrl-c" else "out of the loop") in errors
    wait_for_end(workers, 10)
    assert not list(temporary.glob("pymp-*"))
    shutil.rmtree(temporary)


POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from featkd.data.workers import end_with_parent
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["featkd.data.workers"])  # otherwise each process imports torch
pools = [ProcessPoolExecutor(1, server, initializer=end_with_parent) for _ in range(2)]
print(*(pool.submit(os.getpid).result() for pool in pools), flush=True)
time.sleep(60)
"""


def test_processes_of_a_pool_end_with_their_parent(server: Server) -> None:
    """Otherwise they would wait for the pool's queue, whose write end they hold themselves."""
    process = server.start(script=POOL)
    pids = line(process, 0).split()
    process.kill()
    wait_for_end(pids, 2)
    process.wait()
