"""Writing shards in a thread, while the teacher computes."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

from featkd.cache import CacheError, CacheWriter, TeacherOutputs
from featkd.cache.background import BackgroundWriter
from featkd.cache.rows import Layout
from featkd.cache.writer import prepare_folder
from tests.cache.made import FULL, LOWRANK, keys_of, manifest, outputs, two_threads, write

CPU = torch.device("cpu")


def started(folder: Path, layout: Layout = FULL) -> BackgroundWriter:
    folder.mkdir()
    head = prepare_folder(folder, manifest(layout, views=1))
    return BackgroundWriter(CacheWriter(folder, head), CPU)


def batch(number: int, layout: Layout = FULL) -> tuple[torch.Tensor, torch.Tensor, TeacherOutputs]:
    """Batch `number` of the outputs that `write` stores, 4 rows each."""
    part = slice(4 * number, 4 * number + 4)
    keys = keys_of(manifest(layout), 0)[part]
    logits, (x,) = outputs(20)
    return keys, keys[:, 1], TeacherOutputs(logits[part], [x[part]])


@pytest.mark.parametrize("layout", [FULL, LOWRANK])
def test_the_files_are_those_written_without_a_thread(tmp_path, layout):
    write(tmp_path / "plain", manifest(layout, views=1))
    with closing(started(tmp_path / "thread", layout)) as background:
        for number in range(5):
            background.add(*batch(number, layout))
            if number in (1, 3, 4):
                background.end_shard(0, number // 2)
        background.flush()
        assert background.written == 3
    found, plain = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "view-00000").iterdir()}
        for name in ("thread", "plain")
    )
    assert len(plain) == 3
    assert found == plain


def test_a_shard_is_written_while_the_next_is_computed_and_few_wait(tmp_path, monkeypatch):
    write_shard, may_go, begun = CacheWriter.write, threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert may_go.wait(20)
        return write_shard(*arguments)

    monkeypatch.setattr(CacheWriter, "write", slow)
    with closing(started(tmp_path / "cache")) as background:
        for number in range(2):
            background.add(*batch(number))
        background.end_shard(0, 0)  # does not wait, although nothing is written yet
        assert begun.wait(20)
        background.add(*batch(2))
        third = threading.Thread(target=background.add, args=batch(3))
        third.start()
        third.join(0.2)
        assert third.is_alive()  # a shard and a batch wait already
        may_go.set()
        third.join(20)
        assert not third.is_alive()
        background.flush()
        assert background.written == 1


@pytest.mark.parametrize("layout", [FULL, LOWRANK])
def test_the_thread_has_no_openmp_team(tmp_path, layout, monkeypatch):
    """A second team of OpenMP threads lets those of the training thread sleep at each wait."""
    found, write_shard = [], CacheWriter.write

    def observed(*arguments):
        found.append((threading.current_thread(), torch.get_num_threads()))
        return write_shard(*arguments)

    monkeypatch.setattr(CacheWriter, "write", observed)
    with two_threads(), closing(started(tmp_path / "cache", layout)) as background:
        for number in range(2):
            background.add(*batch(number, layout))
        background.end_shard(0, 0)
        background.flush()
        assert torch.get_num_threads() == 2
    ((thread, number),) = found
    assert thread is not threading.current_thread()
    assert number == 1


def test_a_map_that_is_not_finite_is_an_error(tmp_path):
    with closing(started(tmp_path / "cache")) as background:
        keys, source_index, given = batch(0)
        given.maps[0][2, 0, 0] = torch.nan
        image = int(keys[2, 1])
        with pytest.raises(CacheError, match=rf"image {image}, copy 0 of view 0: the map of layer"):
            background.add(keys, source_index, given)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(*_):
        raise CacheError("could not write: no space left")

    monkeypatch.setattr(CacheWriter, "write", full)
    with closing(started(tmp_path / "cache")) as background:
        background.add(*batch(0))
        background.end_shard(0, 0)
        with pytest.raises(CacheError, match="no space left"):
            background.flush()
