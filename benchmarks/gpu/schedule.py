"""Parts, their time limits and order, and the processes that run them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import facts
from .recorder import BROKEN, Item, read

WHOLE_RUN = 590  # seconds
_RESTARTS = 6


@dataclass(frozen=True)
class Part:
    """Checks or measurements that run in separate processes, for at most `limit` seconds."""

    name: str
    about: str
    limit: int
    work: str = ""
    """Module and function that run the part."""
    share: float = 0.0
    """Share of the cores that get a process each; 0 is one process."""


# The waves run one after another, and the parts of a wave side by side; timed parts run alone.
WAVES: tuple[tuple[Part, ...], ...] = (
    (
        Part("build", "csrc with its CUDA half", 230),
        Part("ops", "accuracy and behaviour of the fused ops", 230, "checks:ops", 0.5),
        Part("warm", "compilation of what is timed later", 200, "speed:warm", 0.3),
    ),
    (Part("speed", "ops against plain torch", 150, "speed:ops"),),
    (
        Part("linalg", "featkd.linalg", 120, "checks:linalg", 0.1),
        Part("large", "maps of more than 2^31 elements", 120, "checks:large"),
        Part("compiled", "the fused ops in torch.compile's modes", 170, "checks:compiled", 0.3),
        Part("updates", "30 updates of the trainer in each mode", 170, "training:updates", 0.4),
        Part("tools", "cache, distill --cache, distill, diagnose", 150, "training:tools", 0.2),
        Part("sanitizer", "compute-sanitizer", 170, "sanitizer:checks", 0.3),
    ),
    (Part("launches", "compiled kernels and launch times", 100, "launches:kernels"),),
)
CPU_WAVES: tuple[tuple[Part, ...], ...] = tuple(
    (part,) for wave in WAVES for part in wave if part.name not in ("build", "warm")
)


@dataclass
class Outcome:
    """Result of a part."""

    part: Part
    seconds: float = 0.0
    problem: str = ""
    """Reason why it did not finish, or ""."""
    items: list[Item] = field(default_factory=list)
    log: str = ""

    def count(self, status: str) -> int:
        """Returns the number of items with that status."""
        return sum(item.status == status for item in self.items)

    @property
    def is_good(self) -> bool:
        """True if the part finished, without a failure and without an item that was cut."""
        return not self.problem and all(x.status in ("passed", "skipped") for x in self.items)


@dataclass
class _Process:
    part: Part
    command: list[str]
    environment: dict[str, str]
    file: Path | None
    log: Path
    started: float = 0.0
    handle: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    problem: str = ""
    ended: float | None = None

    def start(self) -> None:
        self.started = self.started or time.monotonic()  # a restart does not begin its time anew
        with self.log.open("ab") as log:
            self.handle = subprocess.Popen(
                self.command,
                cwd=facts.ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # its children are killed with it
            )

    def look(self, deadline: float) -> bool:
        """Returns True if the process is still running; ends it after its deadline."""
        assert self.handle is not None
        code = self.handle.poll()
        now = time.monotonic()
        if code is None and now < min(deadline, self.started + self.part.limit):
            return True
        self._end_group()  # its children may outlive it
        if code is None:
            self.problem = f"ended after {now - self.started:.0f} s"
        elif code in (BROKEN, -signal.SIGSEGV, -signal.SIGABRT) and self.restarts < _RESTARTS:
            # the item that broke it is recorded: a new process continues with the next one
            self.restarts += 1
            self.start()
            return True
        elif code not in (0, BROKEN):
            self.problem = f"exit code {code}: {_tail(self.log)}"
        self.ended = now
        return False

    def kill(self) -> None:
        """Ends the process and its children."""
        if self.handle is not None and self.ended is None:
            self._end_group()

    def _end_group(self) -> None:
        assert self.handle is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.handle.pid, signal.SIGKILL)
        self.handle.wait()


def _tail(log: Path, size: int = 1500) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    return text[-size:].strip()


def run(
    waves: Sequence[Sequence[Part]], device: str, folder: Path, gpus: list[Any], only: Sequence[str]
) -> list[Outcome]:
    """Runs all parts, or those in `only`; a part without time left has a problem in its outcome."""
    deadline = time.monotonic() + WHOLE_RUN
    outcomes = []
    for wave in waves:
        chosen = [part for part in wave if not only or part.name in only]
        processes = [p for part in chosen for p in _processes(part, device, folder, gpus)]
        for process in processes:
            process.start()
        try:
            at_work = list(processes)
            while at_work:
                time.sleep(0.1)
                at_work = [p for p in at_work if p.look(deadline)]
        finally:
            for process in processes:
                process.kill()
        for part in chosen:
            outcome = _outcome(part, [p for p in processes if p.part is part])
            outcomes.append(outcome)
            state = "ok" if outcome.is_good else "NOT OK"
            print(
                f"{part.name:10} {outcome.seconds:5.0f} s  {outcome.count('passed')} passed, "
                f"{outcome.count('failed') + outcome.count('begun')} failed, "
                f"{outcome.count('cut')} cut by their time limit, "
                f"{outcome.count('skipped')} skipped  {state}  {outcome.problem[-300:]}",
                flush=True,
            )
    return outcomes


def _processes(part: Part, device: str, folder: Path, gpus: list[Any]) -> list[_Process]:
    log = folder / f"{part.name}.log"
    if not part.work:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return [_Process(part, command, facts.build_environment(gpus), None, log)]
    cores = len(os.sched_getaffinity(0))
    count = max(1, int(part.share * cores)) if device == "cuda" else 1
    folders = (facts.ROOT, facts.ROOT / "tools" / "ptx_emulator")
    known = {**os.environ, "PYTHONPATH": ":".join(map(str, folders)), "PYTHONFAULTHANDLER": "1"}
    known.setdefault("OMP_NUM_THREADS", "1" if device == "cpu" else str(max(1, cores // 8)))
    known.setdefault("OMP_WAIT_POLICY", "passive")
    # per process
    known.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // (2 * count))))
    found = []
    for shard in range(count):
        file = folder / f"{part.name}.{shard}.jsonl"
        words = [part.work, device, str(shard), str(count), str(file)]
        command = [sys.executable, "-m", "benchmarks.gpu.part", *words]
        found.append(_Process(part, command, known, file, log))
    return found


def _outcome(part: Part, processes: Sequence[_Process]) -> Outcome:
    items = [item for p in processes if p.file is not None for item in read(p.file)]
    problems = [p.problem for p in processes if p.problem]
    undone = [item.name for item in items if item.status == "begun"]
    if undone:
        problems.append(f"ended during {', '.join(undone)}")
    seconds = max(((p.ended or p.started) - p.started for p in processes), default=0.0)
    log = "\n".join(dict.fromkeys(_tail(p.log, 6000) for p in processes))
    return Outcome(part, seconds, "; ".join(dict.fromkeys(problems)), items, log)
