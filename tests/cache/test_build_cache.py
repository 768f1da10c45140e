"""Building a cache: the same bytes after any interruption, and what is refused."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from featkd.cache import CacheConfig, CacheError, TeacherCache
from featkd.cache.shard import Shard, write_shard
from featkd.cli.main import main
from featkd.runtime.distributed import ProcessContext
from featkd.train.build_cache import CacheBuild, build_cache
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import Teacher
from tests.cache.made import column_of
from tests.conftest import TEACHER
from tests.forking import Forked
from tests.train.runs import CPU

LOWRANK = ("--features", "lowrank")
KILLS = int(os.environ.get("FEATKD_KILLS", "1"))


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def filled(recipe: Recipe, folder: Path, **options) -> CacheBuild:
    config = CacheConfig(**{"views": 2, "shard_rows": 16, **options})
    return build_cache(recipe, config, CPU, folder, quiet=True)


def refused(error: type[Exception], message: str, *args, **options) -> None:
    with pytest.raises(error, match=message):
        filled(*args, **options)


@pytest.fixture
def unbroken(recipe, tmp_path) -> str:
    """Digest of the cache that `filled` builds without an interruption."""
    filled(recipe, tmp_path / "unbroken")
    return digest(tmp_path / "unbroken")


def words(recipe_file: Path, folder: Path, views: int = 2) -> list[str]:
    options = ["--out", folder, "--views", views, "--shard-rows", "16", "--data.workers", "1"]
    return list(map(str, ["cache", recipe_file, *options]))


@pytest.mark.usefixtures("one_thread")
def test_two_processes_and_partial_shards_change_no_byte(recipe, recipe_file, server, tmp_path):
    """48 rows in batches of 10 give shards of 20, 20 and 8."""
    one, two = tmp_path / "one", tmp_path / "two"
    found = filled(replace(recipe, batch_size=10), one)
    assert (found.written, found.damaged, found.interrupted_by) == (6, 0, None)

    def build() -> list[Forked]:
        ranks = server.ranks(2, *words(recipe_file, two), "--batch_size", 10, "--data.workers", 0)
        for rank in ranks:
            assert rank.wait() == 0, rank.stderr
        assert digest(one) == digest(two)
        return ranks

    ranks = build()
    assert "2 views of 48 rows in 6 shards, 6 written" in ranks[0].stdout
    assert ranks[1].stdout == ""
    damaged, gone = (two / "view-00000" / f"shard-0000{number}.safetensors" for number in (1, 2))
    damaged.write_bytes(b"")
    gone.unlink()
    ranks = build()
    assert "6 shards, 2 written, 1 of them to replace damaged ones" in ranks[0].stdout
    assert f"{damaged}: damaged: " in ranks[0].stderr
    sizes = [len(TeacherCache(one)._shard(0, number)) for number in range(3)]
    assert sizes == [20, 20, 8]


@pytest.mark.usefixtures("one_thread")
def test_kills_change_no_byte(recipe, recipe_file, server, tmp_path):
    """SIGKILL, each time a few files later; FEATKD_KILLS sets how often."""
    views = 2 + KILLS
    filled(recipe, tmp_path / "unbroken", views=views)
    out = tmp_path / "killed"
    draw = random.Random(0)
    count = 0
    for _ in range(KILLS):
        process = server.start(*words(recipe_file, out, views))
        count += draw.randrange(1, 3)
        wait_for_shards(out, count, process)
        time.sleep(draw.random() * 0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = server.call(*words(recipe_file, out, views))
    assert done.returncode == 0, done.stderr
    written = int(done.stdout.split(" shards, ")[1].split()[0])
    assert 0 < written < 3 * views
    assert "damaged" not in done.stdout
    assert digest(out) == digest(tmp_path / "unbroken")


def wait_for_shards(out: Path, count: int, process) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("view-*/*.safetensors"))) < count:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_signal_stops_it_and_the_same_command_continues(
    recipe, recipe_file, unbroken, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "cache"
    outputs, left = Teacher.outputs, iter(range(3))

    def stop_at_the_fourth(self, batch):
        if next(left, None) is None:
            signal.raise_signal(signal.SIGTERM)
        return outputs(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "outputs", stop_at_the_fourth)
        assert main(words(recipe_file, out)) == 128 + signal.SIGTERM
    assert "featkd: stopped by signal 15; the same command continues" in capsys.readouterr().err
    assert main(["cache", "--verify", str(out)]) == 1
    assert "4 of 6 shards are damaged or missing" in capsys.readouterr().err
    assert filled(recipe, out).written == 4
    assert digest(out) == unbroken


def test_processes_agree_on_every_shard(recipe, unbroken, tmp_path, monkeypatch):
    """A signal to another process stops this one after the present shard."""
    met = iter(range(2))
    monkeypatch.setattr(ProcessContext, "any_true", lambda *_: next(met, None) is None)
    found = filled(recipe, tmp_path / "cache")
    assert (found.written, found.interrupted_by) == (2, signal.SIGTERM)
    monkeypatch.undo()
    assert filled(recipe, tmp_path / "cache").written == 4
    assert digest(tmp_path / "cache") == unbroken


def test_intact_shards_are_kept_and_damaged_ones_rewritten(recipe, recipe_file, tmp_path, capsys):
    out = tmp_path / "cache"
    filled(recipe, out)
    before = digest(out)
    damaged, whole = (out / f"view-0000{n}" / "shard-00001.safetensors" for n in (1, 0))
    gone = out / "view-00000" / "shard-00000.safetensors"
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    stamp = whole.stat().st_mtime_ns
    assert main(["cache", "--verify", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"{damaged}: damaged" in said
    assert f"{gone}: missing" in said
    assert "2 of 6 shards are damaged or missing" in said
    assert main(words(recipe_file, out)) == 0
    done = capsys.readouterr()
    assert "2 written, 1 of them to replace damaged ones" in done.out
    assert f"{damaged}: damaged: has " in done.err
    assert whole.stat().st_mtime_ns == stamp
    assert digest(out) == before
    assert main(["cache", "--verify", str(out)]) == 0
    assert "2 views of 48 rows in 6 shards, all whole" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["row", "keys", "rows"])
def test_damaged_and_misplaced_shards_are_rewritten(recipe, tmp_path, what):
    """Header and index of each are intact."""
    out = tmp_path / "cache"
    filled(recipe, out)
    before = digest(out)
    path, other, short = (
        out / f"view-{view:05d}" / f"shard-{number:05d}.safetensors"
        for view, number in ((0, 1), (1, 1), (0, 2))
    )
    content = bytearray(path.read_bytes())
    content[column_of(content, "logits")] ^= 1
    if what == "rows":
        identity = TeacherCache(out).manifest.identity
        shard = Shard(short, identity)
        keys, rows = shard._tensors["keys"][:3], [shard.row(number) for number in range(3)]
        write_shard(path, identity, keys, keys[:, 1], rows)
    else:
        path.write_bytes(content if what == "row" else other.read_bytes())
    found = filled(recipe, out)
    assert (found.written, found.damaged) == (1, 1)
    assert digest(out) == before


def test_views_can_be_added(recipe, unbroken, tmp_path):
    filled(recipe, tmp_path / "more", views=1)
    found = filled(recipe, tmp_path / "more", views=2)
    assert found.written == 3
    assert digest(tmp_path / "more") == unbroken
    refused(
        CacheError, r"views: expected at least 2, .*, got 1", recipe, tmp_path / "more", views=1
    )


def test_foreign_folders_and_other_caches_are_refused(recipe, tmp_path):
    out = tmp_path / "cache"
    filled(recipe, out, features="full")
    (out / "view-00000" / f".shard.{2**22}.tmp").touch()
    before = digest(out)
    for options, message in (
        ({"logits_top": 2}, "logits_top: None, not 2"),
        ({"features": "lowrank"}, "features: 'full', not 'lowrank'; .*energy: None, not 0.99"),
        ({"shard_rows": 8}, "shard_rows: 16, not 8"),
    ):
        refused(
            CacheError,
            f"holds another cache: .*{message}",
            recipe,
            out,
            **{"features": "full", **options},
        )
    message = r"another cache: seed: 0, not 1; weights: '[0-9a-f]{64}',"
    refused(CacheError, message, replace(recipe, seed=1), out, features="full")
    assert digest(out) == before
    (tmp_path / "full").mkdir()
    foreign = {"thesis.tex", f".thesis.tex.{2**22}.tmp"}  # of an ended process
    for name in foreign:
        (tmp_path / "full" / name).touch()
    refused(CacheError, r"holds thesis\.tex; expected a cache or", recipe, tmp_path / "full")
    assert {path.name for path in (tmp_path / "full").iterdir()} == foreign
    (tmp_path / "file").touch()
    refused(CacheError, "file is a file, expected a folder", recipe, tmp_path / "file")
    refused(
        RecipeError,
        "teacher: null",
        replace(recipe, teacher=None, loss=replace(recipe.loss, alpha=0, feature=None)),
        out,
    )


def test_an_untrainable_recipe_is_refused_before_the_teacher_runs(recipe, tmp_path):
    student, out = recipe.student, tmp_path / "cache"
    for other, message in (
        ({"student": replace(student, num_classes=5)}, "student.num_classes: 5, but the training"),
        ({"student": replace(student, teacher_dim=48)}, "student.teacher_dim: 48, but the teacher"),
        ({"loss": replace(recipe.loss, pairs=[(7, -1)])}, r"loss.pairs \(student\): .*7"),
        (
            {"teacher": replace(recipe.teacher, options={**TEACHER, "num_classes": 5})},
            "loss.alpha: needs logits of the same classes, but the student has 3 and .* 5",
        ),
    ):
        for features in ("full", "none"):
            refused(RecipeError, message, replace(recipe, **other), out, features=features)
    assert not out.exists()


HOLD = """\
import fcntl, sys
with open(sys.argv[1], "wb") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_writes_at_a_time(recipe, tmp_path):
    out = tmp_path / "cache"
    filled(recipe, out, views=1)
    hold = [sys.executable, "-c", HOLD, str(out / ".lock")]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        refused(CacheError, r"out: .*cache is in use by another process; wait", recipe, out)
        other.stdin.close()
    assert filled(recipe, out).written == 3


def test_a_full_disk_leaves_the_shards_written_before(recipe, unbroken, tmp_path, monkeypatch):
    """The write of the third shard fails half-way."""
    out = tmp_path / "cache"
    fsync, left = os.fsync, iter(range(5))  # of the manifest and its folder, of shards and theirs

    def full(descriptor):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("featkd.runtime.files.os.fsync", full)
        message = r"could not write .*No space left.* before are intact"
        refused(CacheError, message, recipe, out)
    written = [path.name for path in out.rglob("*.safetensors")]
    assert written
    assert not list(out.rglob("*.tmp"))
    assert filled(recipe, out).written == 6 - len(written)
    assert digest(out) == unbroken


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "--out: expected the folder of the cache, as in --out CACHE; got nothing"),
        (["--out", "s3://bucket/x"], "out: expected a folder on this machine, got 's3://bucket/x'"),
        (["--out", "x", "--data.path", "gs://x"], "data.path: expected a folder on this machine"),
        (["--out", "x", "--viws", "2"], "no option '--viws'; did you mean '--views'?"),
        (
            ["--out", "x", *LOWRANK, "--rank", "17"],
            "rank: expected 1 to 16, the lesser of the 16 tokens and",
        ),
        (["--out", "x", "--logits-top", "4"], "logits_top: expected 1 to 3, the teacher's classes"),
        (["--out", "x", "--store", "int4"], "--store: expected fp32, bf16, fp16, int8 or null"),
    ],
)
def test_mistakes_get_one_clear_message(
    recipe_file, tmp_path, monkeypatch, capsys, others, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["cache", str(recipe_file), *others]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [recipe_file.name]
    assert main(["cache", "--verify"]) == 2
    assert main(["cache", "--verify", "s3://bucket/x"]) == 2
    assert "--verify: expected a folder on this machine" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("features", ["full", "lowrank", "none"])
def test_the_estimated_size_is_that_of_the_files(recipe, tmp_path, features):
    folder = tmp_path / "cache"
    config = CacheConfig(views=2, shard_rows=16, features=features)
    planned = build_cache(recipe, config, CPU, folder, quiet=True, dry_run=True)
    assert not folder.exists()
    built = build_cache(recipe, config, CPU, folder, quiet=True)
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert planned.size.total == pytest.approx(written, rel=0.25)
    assert built.size.total >= 0.75 * written
    assert built.size.at_most == (features == "lowrank")
    assert not planned.size.at_most


def test_a_dry_run_prints_the_size_and_writes_nothing(recipe_file, tmp_path, capsys):
    assert main([*words(recipe_file, tmp_path / "cache"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.match(r"2 views of 48 rows in 6 shards: about [\d.]+ kB, \d+ bytes per row; ", said)
    assert said.count("\n") == 1
    assert not (tmp_path / "cache").exists()
    assert main(words(recipe_file, tmp_path / "cache", views=1)) == 0
    noted = capsys.readouterr()
    assert "size of the cache: about " in noted.err
    assert main([*words(recipe_file, tmp_path / "cache", views=1), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
