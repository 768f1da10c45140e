"""Reading rows ahead: order, timing and errors."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from featkd.cache import CacheError, TeacherCache
from featkd.cache.ahead import ReadAhead
from featkd.train.trainer import Trainer
from tests.cache.made import two_threads
from tests.train.runs import CPU, with_cache

KEYS = [torch.tensor([[0, image, 0]]) for image in range(6)]


def image_of(keys: torch.Tensor) -> int:
    return int(keys[0, 1])


def test_the_next_two_batches_are_read_ahead():
    begun = [threading.Event() for _ in KEYS]
    ahead = ReadAhead(lambda keys: begun[image_of(keys)].set())
    ahead.prefetch(iter(KEYS))
    assert begun[1].wait(10)
    assert not begun[2].is_set()
    ahead.read(KEYS[0])
    assert begun[2].wait(10)
    assert not begun[3].is_set()


def test_unexpected_batches_get_their_own_rows():
    images = []
    ahead = ReadAhead(lambda keys: images.append(image_of(keys)) or images[-1])
    assert ahead.read(KEYS[4]) == 4  # nothing is expected
    ahead.prefetch(iter(KEYS[:4]))
    assert [ahead.read(KEYS[number]) for number in (0, 2, 3, 1)] == [0, 2, 3, 1]
    assert 5 not in images
    ahead.prefetch(iter(KEYS))
    ahead.prefetch(iter(KEYS[3:]))
    assert [ahead.read(KEYS[number]) for number in (3, 4, 5)] == [3, 4, 5]


def test_the_thread_has_no_openmp_team():
    """A second team of OpenMP threads lets those of the training thread sleep at each wait."""
    with two_threads():
        ahead = ReadAhead(lambda keys: torch.get_num_threads())
        assert ahead.read(KEYS[0]) == 1
        assert torch.get_num_threads() == 2


def test_an_error_is_raised_at_its_own_batch():
    def read(keys: torch.Tensor) -> int:
        if image_of(keys) == 1:
            raise CacheError("image 1")
        return image_of(keys)

    ahead = ReadAhead(read)
    ahead.prefetch(iter(KEYS))
    assert ahead.read(KEYS[0]) == 0
    with pytest.raises(CacheError, match="image 1"):
        ahead.read(KEYS[1])
    assert ahead.read(KEYS[2]) == 2


def test_a_run_prefetches_its_batches(recipe, tmp_path, monkeypatch):
    """From the start of an epoch and from within it, each batch is read once."""
    trainer = Trainer(with_cache(recipe, tmp_path / "cache"), CPU)
    read = []
    rows = TeacherCache.read
    monkeypatch.setattr(TeacherCache, "read", lambda *args: (read.append(args[1]), rows(*args))[1])
    for epoch, start in ((0, 0), (1, 1)):
        read.clear()
        batches = [
            (batch, trainer.components.teacher_outputs(batch))[0]
            for batch in trainer.batches(epoch, start)
        ]
        assert len(batches) == len(trainer.components.train_loader) - start
        assert all(map(torch.equal, read, (batch.keys for batch in batches)))
        assert len(read) == len(batches)


def test_workers_are_forked_before_threads_read(recipe, tmp_path, monkeypatch):
    """A process forked while another thread holds a lock can hang."""
    data = replace(recipe.data, backend="timm", workers=1)
    trainer = Trainer(with_cache(replace(recipe, data=data), tmp_path / "cache"), CPU)
    before, threads = set(threading.enumerate()), []
    fork = DataLoader.__iter__

    def iterate(loader):
        threads.extend(set(threading.enumerate()) - before)
        return fork(loader)

    monkeypatch.setattr(DataLoader, "__iter__", iterate)
    try:
        next(trainer.batches(0))
        assert threads == []
    finally:
        trainer.components.close()
