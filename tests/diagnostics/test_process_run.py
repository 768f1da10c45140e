"""Single processes of a run of two, with simulated collectives."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from featkd.diagnostics import DiagnoseConfig, Settings, process_run
from featkd.diagnostics.process_run import ProcessRun
from featkd.diagnostics.source import Chunk, Layer
from tests.diagnostics.maps import feature_maps

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = Layer("", 0)
SETTINGS = Settings(sample=2, permuted=1, permutations=1)


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

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any_true(self, flag: bool) -> bool:
        return True

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


def first_pass(source, context, folder):
    """State of a process at the end of its first pass."""
    config = DiagnoseConfig(features="unused", on_bad="skip", settings=SETTINGS)
    run = ProcessRun(source, config, folder, context)
    with pytest.raises(FirstPassEnded):
        run.run()
    return context.states[0]


@pytest.fixture
def bars(monkeypatch):
    """Progress bars of a run, as [initial, done, total]."""
    made = []

    class Bar(contextlib.nullcontext):
        def __init__(self, *, initial, total, **_):
            super().__init__(self)
            made.append([initial, initial, total])

        def update(self, images):
            made[-1][1] += images

    monkeypatch.setattr(process_run, "tqdm", Bar)
    return made


@pytest.mark.parametrize("unusable", [(), (0,), (0, 1, 2)])
def test_only_process_0_reads_ahead_to_calibrate(tmp_path, unusable):
    sources = RecordingSource(unusable), RecordingSource(unusable)
    main = SimulatedContext(0)
    one = first_pass(sources[0], main, tmp_path)
    first = len(unusable)
    # chunks of the other process, only if the first chunks are unusable
    ahead = [number for number in range(first + 1) if number % 2]
    assert sorted(sources[0].read) == sorted([0, 2, 4, *ahead])
    other = SimulatedContext(1, received=main.sent[0])
    two = first_pass(sources[1], other, tmp_path)
    assert sources[1].read == [1, 3, 5]
    assert other.sent == [None]
    pilot = sources[0]._maps[2 * first : 2 * first + 2].double().flatten(0, 1).mean(0).float()
    assert torch.equal(one["pca"]["pilot"], pilot)
    assert torch.equal(two["pca"]["pilot"], pilot)
    assert one["seen"] + two["seen"] == 12 - 2 * first


def test_chunks_read_ahead_are_freed_one_by_one(tmp_path, monkeypatch):
    """Feature maps of many layers fill a GPU's memory."""
    maps, held = [], []

    class Source(RecordingSource):
        def chunks(self, numbers):
            for chunk in super().chunks(numbers):
                maps.append(weakref.ref(chunk.maps[LAYER]))
                yield chunk

    update = process_run.LayerDiagnostics.update

    def count(self, *arguments):
        held.append(sum(one() is not None for one in maps))
        update(self, *arguments)

    monkeypatch.setattr(process_run.LayerDiagnostics, "update", count)
    first_pass(Source(unusable=(0, 1, 2, 3)), SimulatedContext(0), tmp_path)
    assert held == [1]  # of three that were read ahead


def test_process_0_resumes_and_broadcasts_the_pilots_again(tmp_path, bars):
    """Another process may have lost its state. Process 0 reads and counts no image twice."""
    main, again = SimulatedContext(0), SimulatedContext(0)
    before = first_pass(RecordingSource(), main, tmp_path)
    assert len(bars) == 1
    source = RecordingSource()
    after = first_pass(source, again, tmp_path)
    assert source.read == []
    assert after["seen"] == before["seen"] == 6
    (pilots, numbers), (first, _) = again.sent[0], main.sent[0]
    assert torch.equal(pilots[0], first[0])
    assert numbers == 9 * 8
    assert len(bars) == 1


def test_progress_of_a_resumed_run(tmp_path, bars, monkeypatch):
    """Images of the earlier run must not count into the rate."""
    update = process_run.LayerDiagnostics.update

    def interrupt(self, *arguments):
        update(self, *arguments)
        if self.images == 4:
            raise KeyboardInterrupt

    config = DiagnoseConfig(features="unused", save_seconds=0, settings=SETTINGS)
    for error in (KeyboardInterrupt, FirstPassEnded):
        monkeypatch.setattr(process_run.LayerDiagnostics, "update", interrupt)
        run = ProcessRun(RecordingSource(), config, tmp_path, SimulatedContext(0))
        with pytest.raises(error):
            run.run()
        interrupt = update
    assert bars == [[0, 2, 6], [2, 6, 6]]
