"""`featkd distill`: real processes, exit codes, messages, signals."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import stat
import tarfile
from pathlib import Path

import pytest

from featkd.cli.main import main
from featkd.train.checkpoint import load
from featkd.train.logs import read_csv
from tests.forking import Forked


def here(*words: object) -> int:
    """Runs a command line in this process, as starting another takes longer than the runs."""
    return main([str(word) for word in words])


def wait_for_updates(out: Path, updates: int, process: Forked) -> None:
    process.wait_until(lambda: len(read_csv(out / "metrics.csv")) >= updates)


def losses(out: Path) -> list[tuple[str, str]]:
    return [(row["update"], row["loss"]) for row in read_csv(out / "metrics.csv")]


def workers_of(process: Forked) -> list[int]:
    return [*map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


LONG = ("--optim.epochs", 6, "--checkpoint.every_updates", 4, "--data.workers", 2)


UNBROKEN: list[tuple[str, str]] = []


@pytest.fixture
def unbroken(recipe_file, server, tmp_path) -> list[tuple[str, str]]:
    """Losses of the uninterrupted LONG run, computed once for all tests."""
    if not UNBROKEN:
        out = tmp_path / "unbroken"
        done = server.call("distill", recipe_file, "--out", out, *LONG)
        assert done.returncode == 0, done.stderr
        UNBROKEN.extend(losses(out))
        assert len(UNBROKEN) == 36
    return UNBROKEN


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_stopped_and_resumed_run_has_the_losses_of_an_uninterrupted_run(
    recipe_file, server, tmp_path, unbroken, number, code
):
    out = tmp_path / "stopped"
    process = server.start("distill", recipe_file, "--out", out, *LONG)
    wait_for_updates(out, 9, process)
    workers = workers_of(process)
    assert len(workers) >= 2
    # a terminal and a control group signal the loader's workers too
    for pid in (process.pid,) if code < 0 else (*workers, process.pid):
        os.kill(pid, number)
    assert process.wait() == code, process.stderr
    assert len(read_csv(out / "metrics.csv")) < 36
    if code > 0:
        assert "--resume auto continues from here" in process.stderr
        done = load(out / "last.pt")["update"]
        assert 9 <= done == len(read_csv(out / "metrics.csv"))
    resumed = server.call("distill", recipe_file, "--out", out, *LONG)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    assert losses(out) == unbroken


@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_sigterm_stops_a_run_beside_special_files(
    recipe_file, server, images, tmp_path, workers
):
    """Opening a FIFO would wait for a writer, and Python handles no signal meanwhile."""
    shutil.copytree(images, tmp_path / "images")
    folder = tmp_path / "images" / "train" / "red"
    special = [folder / name for name in ("fifo.png", "socket.png", "zero.png")]
    os.mkfifo(special[0])
    os.mknod(special[1], stat.S_IFSOCK | 0o600)
    special[2].symlink_to("/dev/zero")
    out = tmp_path / "run"
    words = ("--data.path", tmp_path / "images", "--data.on_bad_image", "skip", "--out", out)
    words += ("--optim.epochs", 500, "--data.workers", workers)
    process = server.start("distill", recipe_file, *words)
    wait_for_updates(out, 7, process)  # all images of the first epoch have been read
    process.kill(signal.SIGTERM)
    assert process.wait() == 143, process.stderr
    for path in special:
        assert f"left out: {path}: " in process.stderr


def test_a_killed_loader_worker_ends_the_run_with_a_message(recipe_file, server, tmp_path):
    out = tmp_path / "run"
    process = server.start("distill", recipe_file, "--out", out, *LONG, "--optim.epochs", 500)
    wait_for_updates(out, 5, process)  # the first checkpoint is after 4
    os.kill(workers_of(process)[0], signal.SIGKILL)
    assert process.wait() == 1
    # other lines may follow: torch's signal handler can raise within a callback
    message = re.compile(r"^featkd: .*DataLoader worker.*for lack of memory", re.MULTILINE)
    assert message.search(process.stderr), process.stderr
    assert load(out / "last.pt")["update"] > 0


def test_a_full_disk_keeps_the_old_checkpoint(recipe_file, server, tmp_path):
    """A file-size limit below the size of a checkpoint makes its write fail."""
    out = tmp_path / "run"
    assert here("distill", recipe_file, "--out", out) == 0
    before = (out / "last.pt").read_bytes()
    words = ("distill", recipe_file, "--out", out, "--optim.epochs", 3)
    failed = server.call(*words, file_size=len(before) // 2)
    assert failed.returncode == 1
    assert f"could not save {out / 'last.pt'}" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert (out / "last.pt").read_bytes() == before
    assert not list(out.glob(".*.tmp"))
    assert here(*words) == 0


def test_dry_run_prints_a_report_and_writes_nothing(recipe_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert here("distill", recipe_file, "--dry-run", "--student.num_classes", 5) == 0
    assert not out.exists()
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    report = dict(lines)
    assert "(widelast)" in report["student"]
    assert "48 training and 12 validation images, 3 classes" in report["data"]
    assert "2 epochs of 6 updates = 12 updates" in report["schedule"]
    notes = [text for name, text in lines if name == "note"]
    assert notes[0].startswith("student.num_classes: 5, but the training set has 3")
    assert notes[1].startswith("teacher: vit_tiny_patch16_224 has random weights")
    assert "images/s loading (0 workers per process)" in report["throughput"]
    assert {"throughput", "peak", "estimated", "would"} <= set(report)


def test_print_config_prints_a_recipe(recipe_file, tmp_path, capsys):
    assert here("distill", recipe_file, "--optim.lr", 0.5, "--print-config") == 0
    printed = capsys.readouterr().out
    copy = tmp_path / "copy.yaml"
    copy.write_text(printed)
    assert here("distill", copy, "--print-config") == 0
    assert capsys.readouterr().out == printed
    assert "lr: 0.5" in printed


def test_own_data_trains_on_a_small_folder(images, tmp_path, capsys):
    """The shipped recipe with random weights, a teacher half as wide, and images of 2 x 2 tokens.

    The 48 training images of 3 classes make two updates.
    """
    out = tmp_path / "run"
    offline = ("--teacher.pretrained=false", "--teacher.random=true")
    offline += ("--student.pretrained=false", "--data.workers=0", "--device=cpu")
    small = ("--teacher.name=cait_xxs24_224", "--student.teacher-dim=192", "--data.img-size=32")
    short = ("--batch-size=24", "--optim.epochs=1", "--optim.warmup-epochs=0")
    words = (*offline, *small, *short, "--log-every=1", "--amp=off")
    assert here("distill", "own_data", "--data", images, "--out", out, *words) == 0
    assert re.search(r"run: 2 updates, best top-1", capsys.readouterr().out)
    rows = read_csv(out / "metrics.csv")
    assert all(0 < float(row["feature_loss"]) < math.inf for row in rows)
    state = load(out / "last.pt")
    assert state["classes"] == ["blue", "green", "red"]
    assert state["model"]["head.weight"].shape == (3, 192)


def test_the_last_line_summarizes_the_run(recipe_file, images, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    (broken / "val" / "red" / "1.png").write_bytes(b"no picture")
    words = ["distill", str(recipe_file), "--data.path", str(broken), "--optim.epochs", "1"]
    words += ["--optim.warmup_epochs", "0"]
    assert main(words) == 1
    assert "red/1.png" in capsys.readouterr().err
    words += ["--data.on_bad_image", "skip", "--out", str(tmp_path / "skipping")]
    assert main(words) == 0
    first = capsys.readouterr()
    assert re.search(r"6 updates, best top-1 .* images/s, 1 unreadable image left out", first.out)
    assert re.search(r"unreadable image no. 1, left out: \S*red/1.png", first.err)
    assert main(words) == 0
    assert "nothing was left to train" in capsys.readouterr().out


def test_bad_data_exit_with_1(recipe_file, images, tmp_path, capsys):
    """Bad data are found while training on a shard, or in the evaluation."""
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    for path in (broken / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    words = ("distill", recipe_file, "--data.path", broken, "--data.on_bad_image", "skip")
    assert here(*words) == 1
    assert "featkd: evaluation: none of the images could be read\n" in capsys.readouterr().err
    (broken / "classes.txt").write_text("blue\ngreen\nred\n")
    for split in ("train", "val"):
        with tarfile.open(broken / split / "a.tar", "w") as archive:
            for number, path in enumerate(sorted((images / "train").rglob("*.png"))):
                label = tmp_path / "label"
                label.write_text("7" if number == 40 else "0")
                archive.add(path, f"{number}.png")
                archive.add(label, f"{number}.cls")
    assert here(*words, "--out", tmp_path / "shards") == 1
    assert "a.tar/40.png: has class 7; classes.txt has 3 lines" in capsys.readouterr().err


MISTAKES = {
    "no recipe": (("no-such",), "no file 'no-such' and no shipped recipe"),
    "unknown option": (("RECIPE", "--optim.lrr", "1"), "did you mean '--optim.lr'?"),
    "wrong type": (("RECIPE", "--optim.lr", "fast"), "optim.lr"),
    "out of range": (("RECIPE", "--optim.lr=-1"), "expected a finite number > 0"),
    "no folder": (("RECIPE", "--data.path", "/no/such"), "/no/such"),
    "no device": (("RECIPE", "--device", "tpu"), "device: expected auto, cpu, cuda"),
    "no model": (("RECIPE", "--student.base", "deit_tinny_patch16_224"), "deit_tiny"),
    "layer": (("RECIPE", "--loss.pairs", "[[5, 0]]"), "5 is out of range"),
    "no file": (("RECIPE", "--teacher.checkpoint", "/no/such.pt"), "/no/such.pt"),
    "teacher's field": (("RECIPE", "--teacher.nmae", "x"), "mean '--teacher.name'?"),
    "last name": (("RECIPE", "--lr", "1"), "did you mean '--optim.lr'?"),
    "a folder": (("/tmp",), "'/tmp' is a folder; expected a YAML file"),
    "resume": (("RECIPE", "--resume", "sometimes"), "--resume: expected auto, force, never or a"),
    "teacher": (("RECIPE", "--teacher", "none"), "expected a mapping of its fields or null"),
    "too large a batch": (("RECIPE", "--batch-size", "3000"), "batch_size: expected at most"),
    "two words": (("RECIPE", "more"), "expected one recipe, got"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(recipe_file, mistake, fails):
    words, message = MISTAKES[mistake]
    fails(("distill", *(recipe_file if word == "RECIPE" else word for word in words)), 2, message)
