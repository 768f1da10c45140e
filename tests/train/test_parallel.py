"""A student on two ranks: DDP's reductions overlap the backward pass, FSDP equals DDP."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from featkd.cli.main import main
from featkd.train.checkpoint import load
from featkd.train.logs import read_csv
from featkd.train.recipe import Arch, LossConfig, to_yaml
from featkd.train.trainer import Trainer
from tests.forking import Server
from tests.test_ranks import succeed
from tests.train import reductions
from tests.train.runs import CPU, changed, check_losses_close

REDUCE = "from tests.train.reductions import main; main()"


def test_gradients_are_reduced_during_a_compiled_backward_pass(recipe, server: Server, tmp_path):
    """Most bytes are on their way before the last product; the updates equal those of one rank."""
    wide = recipe.student.options | {"embed_dim": 192, "drop_path_rate": 0.0}
    # Adam's first updates follow the signs of gradients, also of those that are noise.
    recipe = changed(
        recipe,
        student=dict(arch="lift", teacher_dim=256, options=wide),
        teacher=dict(options=recipe.teacher.options | {"embed_dim": 256, "num_heads": 4}),
        data=dict(augment=dict(random_erasing=0.0)),
        optim=dict(optimizer="sgd", lr=0.1, warmup_epochs=0),
        compile=True,
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    succeed(server.ranks(2, path, tmp_path / "result", script=REDUCE))
    ranks = [torch.load(tmp_path / f"result.{rank}") for rank in (0, 1)]
    for rank in ranks:
        assert rank["early"] > sum(rank["sizes"]) / 2
    alone = Trainer(replace(recipe, batch_size=16, compile=False), CPU)
    alone.components.student.train()
    batches = alone.batches(0)
    losses = [alone.step([next(batches)]).total.item() for _ in range(reductions.UPDATES)]
    shared = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert shared == pytest.approx(losses, rel=1e-5)
    for name, expected in alone.components.student.state_dict().items():
        one, other = (rank["weights"][name] for rank in ranks)
        assert torch.equal(one, other)
        if not name.endswith("qkv.bias"):  # attention ignores the keys' third, which is noise
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("feature", [None, "mse"])
@pytest.mark.parametrize("arch", get_args(Arch))
def test_every_parameter_gets_a_gradient(recipe, arch, feature):
    """DDP would wait forever for a gradient that does not come."""
    teacher = None if feature is None or arch == "plain" else recipe.teacher
    loss = LossConfig() if teacher is None else LossConfig(feature=feature)
    recipe = changed(recipe, student=dict(arch=arch), teacher=teacher, loss=loss)
    trainer = Trainer(recipe, CPU)
    trainer.apply_gradients = lambda: None
    trainer.step([next(trainer.batches(0))])
    student = trainer.components.student
    assert [n for n, p in student.named_parameters() if p.grad is None] == []


def test_a_sharded_student_trains_as_a_replicated_one(
    recipe_file, server, images, tmp_path, capsys
):
    """Losses, scores and checkpoints; each resumes from a checkpoint of the other.

    One validation image is missing, so that the ranks evaluate different numbers of batches.
    """
    data = tmp_path / "images"
    shutil.copytree(images, data)
    next((data / "val").rglob("*.png")).unlink()
    words = ("distill", recipe_file, "--student.arch", "lift", "--data.path", data, "--amp", "fp16")
    words += ("--batch_size", 5, "--optim.accumulate", 2, "--optim.clip_grad", 0.5)

    def both(*more: object, ddp: Path, fsdp: Path) -> None:
        ranks = server.ranks(2, *words, *more, "--out", ddp)
        succeed([*ranks, *server.ranks(2, *words, *more, "--distributed", "fsdp", "--out", fsdp)])
        check_losses_close(ddp, fsdp)
        for one, other in zip(*(read_csv(out / "eval.csv") for out in (ddp, fsdp)), strict=True):
            assert (one["top1"], one["images"]) == (other["top1"], other["images"])
            assert one["images"] == "11"
        a, b = (load(out / "last.pt") for out in (ddp, fsdp))
        assert a["scaler"] == b["scaler"]
        for kind in ("model", "model_ema"):
            compare(a[kind], b[kind])
        assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
        for number, state in a["optimizer"]["state"].items():
            compare(state, b["optimizer"]["state"][number])

    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    both(ddp=ddp, fsdp=fsdp)
    for out in (ddp, fsdp):  # as if killed in the last evaluation
        torch.save({**torch.load(out / "last.pt"), "evaluation_pending": True}, out / "last.pt")
    ddp.rename(tmp_path / "swapped")
    fsdp.rename(ddp)
    (tmp_path / "swapped").rename(fsdp)
    both("--optim.epochs", 3, ddp=ddp, fsdp=fsdp)
    single = [str(word) for word in (*words, "--distributed", "fsdp", "--out", ddp)]
    assert main([*single, "--optim.epochs", "4"]) == 0
    output = capsys.readouterr().err
    assert "distributed: fsdp has no effect on a run of one process" in output
    assert "distributed: 'ddp' -> 'fsdp'" in output


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        if not name.endswith("qkv.bias"):  # attention ignores the keys' third, which is noise
            torch.testing.assert_close(x, other[name], rtol=1e-3, atol=2e-5)
