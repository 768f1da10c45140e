"""Runs featkd's command line in processes forked from one that has imported it.

Importing takes seconds, and tests of stops, kills and several ranks need many processes. Each
command has its own session, signals, exit code and output. `python -m tests.forking` is the process
from which they are forked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

# modules that the commands import
IMPORTED = (
    *("featkd.cli.diagnose", "featkd.cli.distill", "featkd.cli.cache", "featkd.cli.errors"),
    *("featkd.cli.evaluate", "featkd.cli.predict", "featkd.evaluation", "featkd.train.trained"),
    *("featkd.train.dryrun", "featkd.train.build_cache"),
    *("attrs", "docstring_parser", "torch.distributed.launcher.api", "torch.utils.tensorboard"),
    "torch.utils.serialization.config",
    "featkd.diagnostics.report",
)


class Forked:
    """A running or finished command."""

    def __init__(self, server: Server, pid: int, folder: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._folder = folder

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    def poll(self) -> int | None:
        """Returns the exit code, -N after signal N, None while the command runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)
        return code

    def wait_until(self, ready: Callable[[], object], seconds: float = 60) -> None:
        """Waits for something that the running command does."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


class Server:
    """The process from which commands are forked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._started: list[Forked] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        *words: object,
        script: str | None = None,
        env: dict[str, str] | None = None,
        file_size: int | None = None,
        elastic: int = 0,
    ) -> Forked:
        """Starts `featkd WORDS`.

        Args:
            script: run `python -c SCRIPT WORDS` instead of featkd's command.
            env: additional environment variables.
            file_size: limit of the size of its files, in bytes.
            elastic: number of ranks, started and restarted by torchrun's agent; 0 uses no agent.
        """
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        request = {
            "words": list(map(str, words)), "folder": str(folder), "script": script,
            "env": env or {}, "file_size": file_size, "elastic": elastic,
        }  # fmt: skip
        self._started.append(Forked(self, self.ask(request), folder))
        return self._started[-1]

    def call(self, *words: object, **options: Any) -> Forked:
        """Starts a command and waits for its end."""
        forked = self.start(*words, **options)
        forked.wait()
        return forked

    def ranks(
        self,
        count: int,
        *words: object,
        env: dict[str, str] | None = None,
        only: int | None = None,
        **options: Any,
    ) -> list[Forked]:
        """Starts `count` ranks of one run, or `only` one of them, without an agent."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(
                *words,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})},
                **options,
            )
            for rank in (range(count) if only is None else [only])
        ]

    def close(self) -> None:
        for forked in self._started:
            if forked.poll() is None:
                os.killpg(forked.pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def _serve() -> None:
    """Answers requests, one per line, until the input ends; a forked child runs its command."""
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # an environment of `make compat` lacks some
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise a child's first full collection copies the memory of all imports
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _run(request)
        print(json.dumps(answer), flush=True)


def _run(request: dict[str, Any]) -> None:
    from featkd.cli.main import main

    os.setsid()
    os.environ.update(request["env"])
    folder = Path(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    if request["file_size"] is not None:
        limits = (request["file_size"], resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if request["elastic"]:
        sys.exit(_under_agent(request["words"], request["elastic"]))
    if request["script"] is not None:
        sys.argv = ["-c", *request["words"]]
        exec(request["script"], vars(sys.modules["__main__"]))
        sys.exit()
    sys.exit(main(request["words"]))


def _under_agent(words: list[str], ranks: int) -> int:
    """Does what `torchrun --standalone --nproc-per-node RANKS --max-restarts 3` does."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=str(os.getpid()), max_restarts=3,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver",
        rdzv_configs={"is_host": True}, local_addr="127.0.0.1",
    )  # fmt: skip
    # Ranks forked from this process, with the agent's threads, can deadlock on a lock.
    multiprocessing.resource_tracker.ensure_running()
    with mock.patch("multiprocessing.util.spawnv_passfds", _fork_of_interpreter):
        multiprocessing.forkserver.ensure_running()
    try:
        elastic_launch(config, _rank)(words)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _fork_of_interpreter(path: str, arguments: list[str], files: list[int]) -> int:
    """Forks in place of spawnv_passfds, whose new interpreter would import everything again."""
    child = os.fork()
    if child:
        return child
    try:
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in files:
                with contextlib.suppress(OSError):  # the descriptor of the listing
                    os.close(int(name))
        with contextlib.suppress(SystemExit):
            exec(arguments[arguments.index("-c") + 1], {})
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _rank(words: list[str]) -> None:
    from featkd.cli.main import main

    multiprocessing.set_start_method(
        "fork", force=True
    )  # the start method of loader workers outside the tests
    sys.exit(main(words))


if __name__ == "__main__":
    _serve()
