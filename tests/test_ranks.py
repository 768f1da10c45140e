"""Training on several ranks equals one rank, and survives stops and kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featkd.cli.main import main
from featkd.data import build_loader
from featkd.runtime.lock import locked
from featkd.train.checkpoint import load
from featkd.train.logs import read_csv
from featkd.train.recipe_file import load_recipe
from featkd.train.trainer import Trainer
from tests.forking import Forked, Server
from tests.train.runs import CPU, changed, check_losses_close, same_weights

EQUAL = ("--student.options.drop_path_rate", 0, "--data.augment.random_erasing", 0)


def succeed(ranks: list[Forked]) -> None:
    for rank in ranks:
        assert rank.wait() == 0, rank.stderr


@pytest.mark.parametrize(("arch", "accumulate", "epochs"), [("widelast", 1, 12), ("lift", 2, 6)])
def test_two_processes_train_one_model(
    recipe_file, server: Server, tmp_path, arch, accumulate, epochs
):
    """Losses and weights equal those of one process with the same global batch.

    They differ by rounding, because gradients are summed in another order.
    """
    words = ["distill", str(recipe_file), "--student.arch", arch, *map(str, EQUAL)]
    words += ["--optim.epochs", str(epochs), "--checkpoint.every_epochs", str(epochs)]
    assert main([*words, "--out", str(tmp_path / "one"), "--batch_size", "16"]) == 0
    words += ["--batch_size", str(8 // accumulate), "--optim.accumulate", str(accumulate)]
    succeed(server.ranks(2, *words, "--out", tmp_path / "two"))
    a, b = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert (a["world_size"], b["world_size"]) == (1, 2)
    for key, value in a["model"].items():
        expected, found = value, b["model"][key]
        if key.endswith("qkv.bias"):  # attention ignores the keys' third, which is noise
            expected, found = (torch.cat(x.chunk(3)[::2]) for x in (expected, found))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    check_losses_close(tmp_path / "one", tmp_path / "two", "logits_loss")
    assert len(read_csv(tmp_path / "two" / "metrics.csv")) == 3 * epochs
    assert {r["images"] for r in read_csv(tmp_path / "two" / "eval.csv")} == {"12"}


def test_each_rank_mixes_its_images_with_its_own_draws(recipe_file, server, tmp_path):
    """The first loss is the mean over the batches of both ranks, each mixed with its rank."""
    words = ["--data.augment.mixup", 0.8, "--data.augment.cutmix", 1, *EQUAL]
    words += ["--optim.epochs", 1, "--optim.warmup_epochs", 0]
    succeed(server.ranks(2, "distill", recipe_file, *words))
    recipe = load_recipe(recipe_file)
    found = float(read_csv(Path(recipe.out) / "metrics.csv")[0]["loss"])
    recipe.student.options["drop_path_rate"] = 0.0
    augment = replace(recipe.data.augment, mixup=0.8, cutmix=1.0, random_erasing=0.0)
    trainer = Trainer(changed(recipe, data=dict(augment=augment)), CPU)

    def loss(rank: int, drawn_by: int) -> float:
        loader = build_loader(
            trainer.recipe.data, split="train", batch_size=8, rank=rank, world_size=2
        )
        trainer.context = replace(CPU, rank=drawn_by)
        return trainer.losses(next(iter(loader))).total.item()

    assert found == pytest.approx((loss(0, 0) + loss(1, 1)) / 2, rel=1e-5)
    assert found != pytest.approx((loss(0, 0) + loss(1, 0)) / 2, rel=1e-3)


def test_two_ranks_stop_together_and_save_a_checkpoint(recipe_file, server, tmp_path):
    """SIGTERM is sent to one rank only, far from any logged update."""
    out = tmp_path / "run"
    words = ("distill", recipe_file, "--out", out, "--optim.epochs", 500)
    words += ("--log_every", 100000, "--checkpoint.every_epochs", 1000)
    ranks = server.ranks(2, *words)
    wait_for(
        lambda: len(read_csv(out / "metrics.csv")) >= 3, ranks
    )  # the last update of an epoch is logged
    ranks[1].kill(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, 143]
    assert "stopped by signal 15" in ranks[0].stderr
    assert load(out / "last.pt")["update"] > 3


def test_bad_images_of_every_rank_are_named(recipe_file, server, images, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    paths = sorted((broken / "val").rglob("*.png"))[:2]  # one per rank
    for path in paths:
        path.write_bytes(b"no picture")
    words = ("--data.path", broken, "--data.on_bad_image", "skip", "--batch_size", 4)
    words += ("--optim.epochs", 1, "--optim.warmup_epochs", 0)
    ranks = server.ranks(2, "distill", recipe_file, *words)
    succeed(ranks)
    assert "2 unreadable images left out" in ranks[0].stdout
    for path in paths:
        assert f"left out: {path}" in ranks[0].stderr


def wait_for(condition, processes: list[Forked], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_ranks_end_with_a_killed_one(recipe_file, server, tmp_path):
    """They print one message; then a single process continues within the epoch."""
    out = tmp_path / "run"
    words = ("distill", recipe_file, "--out", out, "--optim.epochs", 16)
    words += ("--checkpoint.every_epochs", 100, "--checkpoint.every_updates", 1)
    ranks = server.ranks(2, *words)
    wait_for((out / "last.pt").exists, ranks)
    ranks[1].kill()
    assert ranks[0].wait(20) == 1
    lost = f"featkd: lost rank 1 (process {ranks[1].pid} on host "
    assert ranks[0].stderr.count(lost) == 1
    assert "Traceback" not in ranks[0].stderr
    alone = server.call(*words, "--batch_size", 16)
    assert alone.returncode == 0, alone.stderr
    assert "processes: 2 -> 1 (16 images per update as before" in alone.stderr
    assert [row["update"] for row in read_csv(out / "metrics.csv")] == [
        str(update) for update in range(1, 49)
    ]


def test_all_ranks_refuse_a_folder_in_use(recipe_file, server, tmp_path):
    """Only rank 0 tries to lock it."""
    out = tmp_path / "run"
    out.mkdir()
    with locked(out):
        ranks = server.ranks(2, "distill", recipe_file, "--out", out)
        assert [rank.wait() for rank in ranks] == [1, 1]
    for rank in ranks:
        assert rank.stderr.endswith("wait until it ends, stop it, or choose another folder\n")
        assert f"featkd: out: {out} is in use by process {os.getpid()} on host" in rank.stderr


KILLS = int(os.environ.get("FEATKD_KILLS", "1"))
KILLED = (
    "--optim.epochs", 12, "--checkpoint.every_updates", 2, "--checkpoint.every_epochs", 2,
    "--data.workers", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def _kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def unbroken(recipe_file, server, tmp_path, _kept) -> Path:
    """Folder of the KILLED run on two ranks without an interruption (made once)."""
    if "out" not in _kept:
        out = tmp_path / "unbroken"
        succeed(server.ranks(2, "distill", recipe_file, "--out", out, *KILLED))
        _kept["out"] = out
    return _kept["out"]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_rank_changes_nothing(recipe_file, server, tmp_path, unbroken, number):
    """Kills a random rank at a random moment; torchrun's agent restarts both.

    FEATKD_KILLS=20 repeats the test. FEATKD_TORCHRUN=1 uses torchrun itself instead of its agent.
    """
    out = tmp_path / "killed"
    draw = random.Random(number)
    rank, update, delay = draw.randrange(2), draw.randrange(1, 30), draw.random() * 0.05
    words = ("distill", recipe_file, "--out", out, *KILLED)
    job = TorchRun(words, tmp_path) if os.environ.get("FEATKD_TORCHRUN") else None
    agent = job or server.start(*words, elastic=2)
    loads = 0

    def reached() -> bool:
        nonlocal loads
        loads += look(out)
        return len(read_csv(out / "metrics.csv")) >= update

    wait_for(reached, [agent], 120)
    time.sleep(delay)
    os.kill(rank_of(agent, rank), signal.SIGKILL)
    while agent.poll() is None:
        loads += look(out)
        time.sleep(0.05)
    assert agent.wait() == 0, agent.stderr
    assert loads > 0
    assert agent.stderr.count("teacher: vit_tiny_patch16_224 has random weights") == 2  # starts
    # A rank killed before the first checkpoint cannot resume.
    assert agent.stderr.count("resumed from") == 1 or update <= 2
    rows = [read_csv(folder / "metrics.csv") for folder in (out, unbroken)]
    assert [(r["update"], r["loss"]) for r in rows[0]] == [
        (r["update"], r["loss"]) for r in rows[1]
    ]
    assert same_weights(out / "last.pt", unbroken / "last.pt")
    print(f"rank {rank} killed at update >= {update}: {loads} checkpoints read meanwhile")


def test_the_real_torchrun_trains_the_same_model(recipe_file, tmp_path, unbroken):
    """The other tests fork the ranks from a process that has imported everything."""
    job = TorchRun(("distill", recipe_file, "--out", tmp_path / "run", *KILLED), tmp_path)
    assert job.wait(120) == 0, job.stderr
    assert same_weights(tmp_path / "run" / "last.pt", unbroken / "last.pt")


def look(out: Path) -> int:
    """Loads all checkpoints and returns their number."""
    return sum(load(path)["update"] > 0 for path in out.glob("*.pt"))


def rank_of(agent: Forked, rank: int) -> int:
    """Returns the process of a rank; the ranks are started in order."""
    found = children(agent.pid)
    if not isinstance(agent, TorchRun):  # here the ranks are children of a server process
        found = [grandchild for child in found for grandchild in children(child)]
    assert len(found) == 2
    return found[rank]


def children(process: int) -> list[int]:
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


class TorchRun(Forked):
    """The torchrun command, which imports everything in each process."""

    def __init__(self, words: tuple[object, ...], folder: Path) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", "2", "--max-restarts", "3", "-m", "featkd"]
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
            self._process = subprocess.Popen(
                [*launcher, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        super().__init__(None, self._process.pid, folder)

    def poll(self) -> int | None:
        self.returncode = self._process.poll()
        return self.returncode
