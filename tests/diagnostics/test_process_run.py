"""Single processes of a run of two, with simulated collectives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from featkd.diagnostics import DiagnoseConfig, Settings
from featkd.diagnostics.process_run import ProcessRun
from featkd.diagnostics.source import Chunk, Layer
from tests.diagnostics.maps import feature_maps

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = Layer("", 0)


class FirstPassEnded(Exception):
    """Raised in place of the first collective after the first pass."""


@dataclass
class SimulatedContext:
    """Process context of a run of two; records what the process broadcasts and gathers."""

    rank: int
    received: Any = None
    sent: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    world_size = 2
    device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any_true(self, flag: bool) -> bool:
        return True

    def barrier(self) -> None:
        pass

    def broadcast(self, value: object) -> Any:
        self.sent.append(value)
        return value if self.is_main else self.received

    def gather(self, value: Any) -> list[Any]:
        self.states.append(value)
        raise FirstPassEnded


class RecordingSource:
    """Maps in chunks of two images, some unusable; records which chunks are read."""

    layers = (LAYER,)
    repeatable = False
    num_images = 12
    chunk_size = 2

    def __init__(self, unusable: tuple[int, ...] = ()) -> None:
        self.notes: list[str] = []
        self.read: list[int] = []
        self._unusable = unusable
        self._maps = feature_maps(self.num_images, 9, 8)

    def chunks(self, numbers):
        for number in numbers:
            self.read.append(number)
            images = torch.arange(2 * number, 2 * number + 2)
            maps: dict[Layer, Tensor] = {LAYER: self._maps[images].clone()}
            if number in self._unusable:
                maps[LAYER][:] = torch.nan
            yield Chunk(number, images, maps)

    def name(self, image: int) -> str:
        return str(image)

    def identity(self) -> dict[str, Any]:
        return {}


def first_pass(source, context, folder, progress=lambda *_: None):
    """State of a process at the end of its first pass."""
    settings = Settings(sample=2, permuted=1, permutations=1)
    config = DiagnoseConfig(features="unused", on_bad="skip", settings=settings)
    run = ProcessRun(source, config, folder, context, progress)
    with pytest.raises(FirstPassEnded):
        run.run()
    return context.states[0]


@pytest.mark.parametrize("unusable", [(), (0,), (0, 1, 2)])
def test_only_process_0_reads_ahead_to_calibrate(tmp_path, unusable):
    sources = RecordingSource(unusable), RecordingSource(unusable)
    main = SimulatedContext(0)
    one = first_pass(sources[0], main, tmp_path)
    first = len(unusable)
    ahead = [
        number for number in range(first + 1) if number % 2
    ]  # only if the first chunks are unusable
    assert sorted(sources[0].read) == sorted([0, 2, 4, *ahead])
    other = SimulatedContext(1, received=main.sent[0])
    two = first_pass(sources[1], other, tmp_path)
    assert sources[1].read == [1, 3, 5]
    assert other.sent == [None]
    pilot = sources[0]._maps[2 * first : 2 * first + 2].double().flatten(0, 1).mean(0).float()
    assert torch.equal(one["pca"]["pilot"], pilot)
    assert torch.equal(two["pca"]["pilot"], pilot)
    assert one["seen"] + two["seen"] == 12 - 2 * first


def test_process_0_resumes_and_broadcasts_the_pilots_again(tmp_path):
    """Another process may have lost its state. Process 0 counts no image twice."""
    main = SimulatedContext(0)
    before = first_pass(RecordingSource(), main, tmp_path)
    source, again = RecordingSource(), SimulatedContext(0)
    calls = []
    after = first_pass(source, again, tmp_path, lambda *call: calls.append(call))
    assert source.read == [0]
    assert after["seen"] == before["seen"] == 6
    pilots, numbers = again.sent[0]
    assert torch.equal(pilots[LAYER].flatten(), main.sent[0][0][LAYER].flatten())
    assert numbers == 9 * 8
    assert calls == []


def test_progress_calls(tmp_path):
    calls = []
    first_pass(RecordingSource(), SimulatedContext(0), tmp_path, lambda *call: calls.append(call))
    assert calls == [(1, 0, 6), (1, 2, 6), (1, 4, 6), (1, 6, 6)]
