"""Trains several recipes side by side, one process per CPU core or per GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import forkserver
from pathlib import Path

import torch
from tqdm import tqdm

from featkd.compare.mismatch import measure_student
from featkd.compare.results import RunResult, throughput, weights_scored
from featkd.data.workers import end_with_parent
from featkd.runtime import distributed
from featkd.runtime.interrupt import Interrupt
from featkd.train.dryrun import forward_macs
from featkd.train.recipe import Recipe
from featkd.train.trainer import Trainer

_stopped = False  # a signal has ended a run of this process
_device = "cpu"  # of the runs of this process


def train(name: str, recipe: Recipe) -> RunResult:
    """Runs one recipe in this process, from its checkpoint if there is one.

    Raises:
        KeyboardInterrupt: a signal ended this run, or an earlier one of this process. The pool
            hands out a few runs in advance, and they cannot be cancelled.
    """
    global _stopped
    if _stopped:
        raise KeyboardInterrupt
    context = distributed.start(_device)
    trainer = Trainer(recipe, context)
    outcome = trainer.run(quiet=True)
    if outcome.interrupted_by is not None:
        _stopped = True
        raise KeyboardInterrupt
    student, ema = trainer.components.student, trainer.components.ema
    return RunResult(
        name=name,
        seed=recipe.seed,
        parameters=sum(p.numel() for p in student.parameters()),
        gmacs=forward_macs(student, recipe.data.img_size) / 1e9,
        top1=outcome.scores[weights_scored(recipe)]["top1"],
        images_per_s=throughput(Path(recipe.out)),
        folder=Path(recipe.out),
        map=measure_student(recipe, student if ema is None else ema.module, context.device),
    )


def devices(device: str) -> list[str]:
    """Returns the device of each run that is trained at the same time.

    Args:
        device: `Recipe.device`: "auto" and "cuda" are all GPUs, "cuda:N" is one, "cpu" all cores.
    """
    if device.startswith("cuda:"):
        return [device]
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu"] * len(os.sched_getaffinity(0))


def train_all(
    jobs: dict[tuple[str, int], Recipe],
    description: str,
    quiet: bool = False,
    device: str = "cpu",
    on_result: Callable[[RunResult], None] = lambda _: None,
) -> list[RunResult]:
    """Runs recipes in parallel: one process per GPU, or one single-threaded process per core.

    The number of threads does not depend on the number of jobs, because it changes results.

    Args:
        jobs: recipes by (name, seed).
        description: label of the progress bar.
        quiet: show no progress bar.
        device: see `devices`.
        on_result: called with each result as soon as its run has finished.

    Returns:
        The results in the order of the jobs.
    """
    places = devices(device)
    server = multiprocessing.get_context("forkserver")  # imports the trainer only once
    server.set_forkserver_preload(["featkd.train.trainer"])
    _start_fork_server()
    results: dict[tuple[str, int], RunResult] = {}
    count = min(len(places), len(jobs))
    with ProcessPoolExecutor(count, server, _start_process, (places[:count],)) as pool:
        try:
            # A process whose start is interrupted would run on without the pool, and fail.
            with Interrupt() as interrupt:
                running = {pool.submit(train, key[0], recipe): key for key, recipe in jobs.items()}
            if interrupt.signal is not None:
                signal.raise_signal(interrupt.signal)
            done = as_completed(running)
            bar = tqdm(
                done,
                description,
                len(running),
                unit="run",
                disable=quiet or None,  # None: no bar if stderr is no terminal
            )
            for future in bar:
                results[running[future]] = result = future.result()
                on_result(result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # it saves its checkpoint, unless Ctrl-C has made it do so
            raise
    return [results[key] for key in jobs]


def _start_process(places: list[str]) -> None:
    """Initializes a process of the pool: its device, and its end with the process that owns it."""
    global _device
    # The pool's processes have consecutive numbers, so each gets a device of its own.
    _device = places[int(multiprocessing.current_process().name.rpartition("-")[2]) % len(places)]
    if _device == "cpu":
        torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default is a semaphore that a killed process leaks
    end_with_parent()


def _start_fork_server() -> None:
    """Starts the fork server with SIGINT ignored, as are then its children outside of training.

    Ctrl-C reaches every process of the terminal. While one of them imports, waits or builds a model
    it would print a traceback; `train_all` ends them all.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread can set a handler
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
