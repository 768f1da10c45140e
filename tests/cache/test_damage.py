"""Damaged caches: changed bits, truncated and foreign files are found and named."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featkd.cache import CacheError, TeacherCache, verify_cache
from featkd.cache import manifest as manifests
from featkd.cache.shard import Shard, write_shard
from featkd.data import SampleKey
from tests.cache.made import FULL, LOWRANK, column_of, keys_of, manifest, outputs, write


@pytest.fixture(params=[FULL, LOWRANK], ids=["full", "lowrank"])
def folder(request, tmp_path: Path) -> Path:
    write(tmp_path / "cache", manifest(request.param))
    return tmp_path / "cache"


def found_in(folder: Path) -> str:
    """Messages of a full check."""
    try:
        return "\n".join(filter(None, verify_cache(folder)))
    except CacheError as error:
        return str(error)


def refused(folder: Path, message: str, views: int | None = None) -> None:
    with pytest.raises(CacheError, match=message):
        TeacherCache(folder, views)


def test_rows_are_read_in_any_order(tmp_path):
    head = manifest(FULL, repeats=1)
    stored = write(tmp_path, head)
    cache = TeacherCache(tmp_path)
    keys = torch.cat([keys_of(head, view) for view in range(2)])
    for order in (torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(0))):
        logits, (maps,) = cache.read(keys[order], [1])[0]
        assert torch.equal(logits, stored.logits[order])
        assert torch.equal(maps, stored.maps[0][order])
    for key in ((2, 0, 0), (0, 20, 0), (0, 1, 1), (-1, 0, 0)):
        with pytest.raises(CacheError, match=r"holds no row of SampleKey.*views 0 to 1 of 20 rows"):
            cache.read(torch.tensor([key]), [1])


def test_repeated_images_have_a_row_per_copy(tmp_path):
    head = replace(manifest(FULL, images=30, repeats=3), rows=24)
    stored = write(tmp_path, head)
    keys = keys_of(head, 1)[:24]
    assert len(set(keys[:, 1].tolist())) == 8
    logits, _ = TeacherCache(tmp_path).read(keys.flip(0), [1])[0]
    assert torch.equal(logits, stored.logits[24:].flip(0))
    unseen = next(i for i in range(30) if i not in keys[:, 1])
    with pytest.raises(CacheError, match=f"image={unseen}"):
        TeacherCache(tmp_path).read(torch.tensor([[1, unseen, 0]]), [1])


def test_any_flipped_bit_is_found_and_its_file_named(folder):
    """100 per form; the file is restored after each."""
    draw = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) == 7
    causes = set()
    for _ in range(100):
        path = draw.choice(files)
        before = path.read_bytes()
        content = bytearray(before)
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        messages = found_in(folder)
        assert str(path) in messages, (path, place)
        causes |= {cause for cause in ("header or index", "row ", "content") if cause in messages}
        path.write_bytes(before)
    assert causes == {"header or index", "row ", "content"}
    assert found_in(folder) == ""


def test_an_open_shard_takes_little_memory(tmp_path):
    """Thousands are open at once; the index of 1024 rows stays in the mapped file."""
    path, keys = tmp_path / "shard", torch.arange(3 * 1024).reshape(-1, 3)
    rows = LOWRANK.encode(outputs(1024))
    write_shard(path, "identity", keys, keys[:, 1], rows, LOWRANK.varying)
    Shard(path, "identity").row(1023)
    tracemalloc.start()
    shard = Shard(path, "identity")
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 20_000
    assert (shard.key(1023), shard.source_index(1023)) == (SampleKey(3069, 3070, 3071), 3070)
    assert shard.row(1023).keys() == rows[1023].keys()


@pytest.mark.parametrize("layout", [FULL, LOWRANK], ids=["full", "lowrank"])
def test_every_bit_of_a_shards_header_counts(tmp_path, layout):
    """A changed comma can merge two numbers, a changed brace the nesting."""
    path, keys = tmp_path / "shard", torch.tensor([[0, 1, 0], [0, 0, 0]])
    write_shard(path, "identity", keys, keys[:, 1], layout.encode(outputs(2)), layout.varying)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    Shard(path, "identity")
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * (8 + length)):
            place, flipped = bit // 8, content[bit // 8] ^ 1 << bit % 8
            os.pwrite(file.fileno(), bytes([flipped]), place)
            with pytest.raises(CacheError, match="damaged"):
                Shard(path, "identity")
            os.pwrite(file.fileno(), content[place : place + 1], place)
    Shard(path, "identity")


def test_a_damaged_row_is_named_by_its_image_and_leaves_the_others(folder):
    head = TeacherCache(folder).manifest
    path = folder / head.shard_name(1, 2)
    keys = keys_of(head, 1)
    content = bytearray(path.read_bytes())
    column = "features.1" if head.layout.features == "full" else "features.1.right"
    content[column_of(content, column)] ^= 4
    path.write_bytes(content)
    image = keys[16, 1]
    assert found_in(folder) == (
        f"{path}: damaged: row 0 (image {image}, copy 0 of view 1) does not match its checksum"
    )
    cache = TeacherCache(folder)
    cache.read(torch.cat((keys[:16], keys[17:])), [1])
    with pytest.raises(CacheError, match=f"image {image}, copy 0 of view 1"):
        cache.read(keys, [1])


@pytest.mark.parametrize("change", [0, 5, 40, 0.5, -1, b"more"])
def test_a_shard_of_another_length_is_named_before_a_run_starts(folder, change):
    """Only if its view is needed."""
    path = folder / "view-00001" / "shard-00001.safetensors"
    content = path.read_bytes()
    if isinstance(change, bytes):
        path.write_bytes(content + change)
    else:
        length = int(change * len(content)) if isinstance(change, float) else change
        path.write_bytes(content[:length])
    assert found_in(folder).startswith(f"{path}: damaged")
    assert "by its header" in found_in(folder) or not isinstance(change, bytes)
    refused(folder, r"shard-00001.safetensors: damaged")
    cache = TeacherCache(folder, views=1)
    cache.read(keys_of(cache.manifest, 0), [1])


def test_misplaced_shards_are_named(folder, tmp_path):
    """From another cache, and from another position in this one."""
    head = TeacherCache(folder).manifest
    write(tmp_path / "other", replace(head, weights="others"))
    path, other = (folder / head.shard_name(0, n) for n in (0, 1))
    kept = path.read_bytes()
    shutil.copy(tmp_path / "other" / head.shard_name(0, 0), path)
    assert f"{path}: belongs to another cache" in found_in(folder)
    path.write_bytes(other.read_bytes())
    assert f"{path}: damaged: row 0 is SampleKey" in found_in(folder)
    with pytest.raises(CacheError, match=r"shard-00000.*: row 0 is SampleKey"):
        TeacherCache(folder).read(keys_of(head, 0)[:1], [1])
    path.write_bytes(kept)
    assert found_in(folder) == ""


def test_an_unfinished_cache_is_refused(folder):
    (folder / "view-00001" / "shard-00002.safetensors").unlink()
    message = r"1 of the 6 shards of views 0 to 1 are missing, such as view-00001/shard-00"
    for views in (None, 2, 9):
        refused(folder, message, views)
    TeacherCache(folder, views=1)
    shutil.rmtree(folder / "view-00000")
    refused(folder, "4 of the 6 shards of views 0 to 1 are missing")
    refused(folder, "3 of the 3 shards of views 0 to 0 are missing", views=1)


def test_no_cache_and_another_format(tmp_path, folder):
    message = r"nowhere: no such folder; expected one that featkd cache has written"
    refused(tmp_path / "nowhere", message)
    head = TeacherCache(folder).manifest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featkd.cache.manifest.SCHEMA", 9)
        head.write(folder)
    refused(folder, r"manifest.json: format 9, this featkd reads 2")


def replace_by(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_files_that_are_not_regular_are_refused(folder, kind):
    """A pipe would be waited for, /dev/zero read until the memory is full."""
    shard = folder / "view-00000" / "shard-00001.safetensors"
    kept = shard.read_bytes()
    replace_by(shard, kind)
    why = "Is a directory" if kind == "folder" else "not a regular file"
    assert f"{shard}: can't be read: " in found_in(folder)
    refused(folder, rf"shard-00001.*: can't be read: .*{why}")
    shard.rmdir() if kind == "folder" else shard.unlink()
    shard.write_bytes(kept)
    TeacherCache(folder)
    replace_by(folder / "manifest.json", kind)
    refused(folder, rf"not a featkd cache: manifest.json: .*{why}")


def sparse(path: Path, header: dict[str, Any], size: int, length: int | None = None) -> None:
    """Writes a file of `size` bytes without data behind the header."""
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)
    os.truncate(path, size)


def test_a_sparse_shard_that_claims_terabytes_is_refused(folder):
    path = folder / "view-00000" / "shard-00001.safetensors"
    size = 5 * 10**12
    entries = {"check": [0, 32], "keys": [32, size]}
    header = {
        name: {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]}
        for name, (first, last) in entries.items()
    }
    start = 8 + len(json.dumps(header))
    sparse(path, header, start + size)
    tracemalloc.start()
    refused(folder, r"shard-00001.*has 50.* bytes, expected at most")
    assert "bytes, expected at most" in found_in(folder)
    sparse(path, header, 100_000, length=5 * 10**12)
    refused(folder, r"shard-00001.*a header of 50.* bytes, expected at most")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def made_up(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and gives it the right checksum."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    del content["checksum"]
    change(content)
    path.write_bytes(manifests._dump({**content, "checksum": manifests._checksum(content)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(rows=10**15), "rows: expected a whole number from 1 to"),
        (lambda x: x.update(rows=20.0), "rows: expected a whole number"),
        (lambda x: x.update(rows=21), "rows: expected at most 20, the images and their copies"),
        (lambda x: x.update(views=10**7, shard_rows=1), "expected at most 10000000 shards"),
        (lambda x: x.update(layout=None), "damaged: AttributeError"),
        (lambda x: x.pop("views"), r"damaged: TypeError: .*views"),
        (lambda x: x.update(more=1), r"damaged: TypeError: .*more"),
        (lambda x: x["subject"].pop("seed"), "damaged: KeyError: 'seed'"),
        (lambda x: x["layout"].update(classes="4"), "layout.classes: expected a whole"),
        (lambda x: x["layout"]["layers"][0].update(tokens=10**9), "expected at most .* per row"),
        (lambda x: x["layout"]["layers"][0].update(layer=7), "layer 7: expected .* from 0 to 1"),
    ],
)
def test_a_made_up_manifest_is_refused(tmp_path, change, message):
    write(tmp_path, manifest(FULL))
    made_up(tmp_path, change)
    refused(tmp_path, rf"manifest.json: .*{message}")


def test_a_manifest_that_is_too_large_or_too_deep_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    refused(tmp_path, r"manifest.json: damaged: RecursionError")
    os.truncate(tmp_path / "manifest.json", 10**12)
    refused(tmp_path, r"manifest.json: larger than 16777216 bytes")
