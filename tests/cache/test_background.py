"""Encoding and writing in a thread, while the teacher computes."""

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
from tests.cache.made import FULL, LOWRANK, keys_of, manifest, outputs, write

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


def test_a_batch_is_encoded_while_the_next_is_computed_and_few_wait(tmp_path, monkeypatch):
    encode, may_go, begun = Layout.encode, threading.Event(), threading.Semaphore(0)

    def slow(layout, given):
        begun.release()
        assert may_go.wait(20)
        return encode(layout, given)

    monkeypatch.setattr(Layout, "encode", slow)
    with closing(started(tmp_path / "cache")) as background:
        for number in range(2):
            background.add(*batch(number))  # does not wait, although nothing is encoded yet
        assert begun.acquire(timeout=20)
        third = threading.Thread(target=background.add, args=batch(2))
        third.start()
        third.join(0.2)
        assert third.is_alive()  # two hold their outputs already
        may_go.set()
        third.join(20)
        assert not third.is_alive()
        background.flush()


def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path):
    with closing(started(tmp_path / "cache")) as background:
        keys, source_index, given = batch(0)
        given.maps[0][2, 0, 0] = torch.nan
        background.add(keys, source_index, given)
        image = int(keys[2, 1])
        with pytest.raises(CacheError, match=rf"image {image}, copy 0 of view 0: the map of layer"):
            background.flush()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
