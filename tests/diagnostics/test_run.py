"""A run's processes, one at a time, with collectives that are played to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from featkd.diagnostics import Settings
from featkd.diagnostics.findings import RunOptions
from featkd.diagnostics.run import DiagnosticsRun
from featkd.diagnostics.source import Chunk, Layer
from tests.diagnostics.maps import feature_maps

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = Layer("", 0)


class Ended(Exception):
    """The first pass is over."""


@dataclass
class Played:
    """A process whose first collectives answer as those of a run of two would."""

    rank: int
    heard: Any = None
    said: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    world_size = 2

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any_true(self, flag: bool) -> bool:
        return True

    def barrier(self) -> None:
        pass

    def broadcast(self, value: object) -> Any:
        self.said.append(value)
        return value if self.is_main else self.heard

    def gather(self, value: Any) -> list[Any]:
        self.states.append(value)
        raise Ended


class Counted:
    """Maps in chunks of two images; notes which chunks are asked for, and which are unusable."""

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
    """The state that a process brings to the end of its first pass."""
    options = RunOptions(on_bad="skip")
    settings = Settings(sample=2, permuted=1, permutations=1)
    run = DiagnosticsRun(source, settings, options, folder, context, progress)
    with pytest.raises(Ended):
        run.run()
    return context.states[0]


@pytest.mark.parametrize("unusable", [(), (0,), (0, 1, 2)])
def test_process_0_alone_reads_what_all_calibrate_by(tmp_path, unusable):
    sources = Counted(unusable), Counted(unusable)
    main = Played(0)
    one = first_pass(sources[0], main, tmp_path)
    first = len(unusable)
    ahead = [number for number in range(first + 1) if number % 2]  # only where the first are bad
    assert sorted(sources[0].read) == sorted([0, 2, 4, *ahead])
    other = Played(1, heard=main.said[0])
    two = first_pass(sources[1], other, tmp_path)
    assert sources[1].read == [1, 3, 5]
    assert other.said == [None]
    pilot = sources[0]._maps[2 * first : 2 * first + 2].double().flatten(0, 1).mean(0).float()
    assert torch.equal(one["pca"]["pilot"], pilot)
    assert torch.equal(two["pca"]["pilot"], pilot)
    assert one["seen"] + two["seen"] == 12 - 2 * first


def test_a_process_that_lost_its_state_gets_its_pilot_again(tmp_path):
    """Process 0 has one: it goes on from where it was, and counts nothing twice."""
    main = Played(0)
    before = first_pass(Counted(), main, tmp_path)
    source, again = Counted(), Played(0)
    calls = []
    after = first_pass(source, again, tmp_path, lambda *call: calls.append(call))
    assert source.read == [0]
    assert after["seen"] == before["seen"] == 6
    pilots, numbers = again.said[0]
    assert torch.equal(pilots[LAYER].flatten(), main.said[0][0][LAYER].flatten())
    assert numbers == 9 * 8
    assert calls == []


def test_progress_begins_with_what_was_done(tmp_path):
    calls = []
    first_pass(Counted(), Played(0), tmp_path, lambda *call: calls.append(call))
    assert calls == [(1, 0, 6), (1, 2, 6), (1, 4, 6), (1, 6, 6)]
