"""The teacher's forward pass in training: what is needed of it alone, in the fastest mode here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featkd.models.features import FeatureModel
from featkd.runtime import environment
from featkd.runtime.files import atomic_write, user_cache

_ROUNDS = 3

Output = tuple[Tensor | None, list[Tensor]]


@dataclass(frozen=True)
class Mode:
    """How torch runs a module; none changes more than the rounding of its numbers."""

    compile: bool = False
    compile_mode: str = "default"
    channels_last: bool = False

    @property
    def name(self) -> str:
        """In words."""
        words = ["eager"] if not self.compile else [f"torch.compile ({self.compile_mode})"]
        return ", ".join(words + ["channels_last"] * self.channels_last)


def modes(device: torch.device) -> list[Mode]:
    """What a trial compares; "reduce-overhead" replays CUDA graphs."""
    tuned = "max-autotune-no-cudagraphs"
    if device.type == "cuda":
        return [Mode(True, name) for name in ("default", tuned, "reduce-overhead", "max-autotune")]
    return [Mode(), Mode(True), Mode(True, channels_last=True), Mode(True, tuned)]


class TeacherForward(nn.Module):
    """A frozen model's logits and maps as a module's forward, for torch.compile.

    Args:
        model: the teacher.
        layers: whose maps are given.
        logits: whether logits are needed; without them nothing runs after the deepest of `layers`.
    """

    def __init__(self, model: FeatureModel, layers: tuple[int, ...], logits: bool) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.logits = logits
        self.channels_last = False

    def forward(self, images: Tensor) -> Output:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.logits:
            return self.model.forward_with_features(images, self.layers)
        return None, self.model.forward_maps(images, self.layers)

    def in_mode(self, mode: Mode) -> TeacherForward:
        """Another such module over the same model, compiled as `mode` says."""
        other = TeacherForward(self.model, self.layers, self.logits)
        other.channels_last = mode.channels_last
        if mode.compile:
            other.compile(mode=mode.compile_mode)
        return other


def fastest(
    forward: TeacherForward, run: Callable[[TeacherForward], Any], about: Sequence[object]
) -> tuple[Mode, str]:
    """The mode in which `run` takes least time, by a short trial that is remembered.

    Each mode runs once to compile and then three times in turns; the least of its times counts. A
    mode that torch can't compile here is left out. The answer is kept in
    $XDG_CACHE_HOME/featkd/teacher_modes.json (~/.cache by default), by machine, versions and
    `about`.

    Args:
        forward: the teacher as it is.
        run: calls what it is given on a batch, under the autocast of the run, and waits for it.
        about: what the answer depends on besides: names, shapes, precision.

    Returns:
        The mode, and how it was found, in words.
    """
    path, key = user_cache() / "teacher_modes.json", _key(about)
    candidates = modes(next(forward.model.parameters()).device)
    remembered = _remembered(_read(path).get(key), candidates)
    if remembered is not None:
        return remembered, f"{remembered.name}, the fastest of an earlier trial ({path})"
    tried: dict[Mode, TeacherForward] = {}
    failed = []
    for mode in candidates:
        candidate = forward.in_mode(mode)
        try:
            run(candidate)
        except Exception as error:  # of torch.compile, whatever it calls: C++ compilers, Triton
            if not mode.compile:
                raise
            said = str(error).strip() or type(error).__name__
            failed.append(f"{mode.name} failed: {said.splitlines()[0]}")
            continue
        tried[mode] = candidate
    if not tried:
        raise RuntimeError(f"teacher.inference: no mode runs here ({'; '.join(failed)})")
    seconds: dict[Mode, list[float]] = {mode: [] for mode in tried}
    for _ in range(_ROUNDS):
        for mode, candidate in tried.items():
            start = time.perf_counter()
            run(candidate)
            seconds[mode].append(time.perf_counter() - start)
    best = min(tried, key=lambda mode: min(seconds[mode]))
    listed = [f"{mode.name} {1e3 * min(times):.1f} ms" for mode, times in seconds.items()]
    found = {"mode": asdict(best), "ms": {m.name: 1e3 * min(t) for m, t in seconds.items()}}
    _write(path, _read(path) | {key: found})
    return best, f"{best.name}, the fastest here: {'; '.join(listed + failed)}"


def _key(about: Sequence[object]) -> str:
    described = [environment.machine(), environment.versions(), [str(part) for part in about]]
    return sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """What is remembered; nothing where the file is missing or was damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remembered(entry: Any, candidates: Sequence[Mode]) -> Mode | None:
    """The mode of an entry, None where it is missing, damaged, or of no use here."""
    try:
        mode = Mode(**entry["mode"])
    except (KeyError, TypeError):
        return None
    return mode if mode in candidates else None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Remember, where that can be: a trial whose answer is lost is only made again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1, sort_keys=True).encode())
    except OSError:
        return
