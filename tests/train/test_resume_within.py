"""Resuming within an epoch: with other batches, other processes, another loader."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featkd.data import factory
from featkd.train.checkpoint import CheckpointError, load
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, NOTHING_DRAWN, changed, column, run, trained


def test_an_epoch_continues_in_other_batches(recipe, monkeypatch):
    """Two updates of 8 images, then the other 32 in batches of 4: each image once."""
    seen: list[torch.Tensor] = []
    losses = Trainer.losses

    def noting(self, batch, number):
        seen.extend(batch.images)
        return losses(self, batch, number)

    monkeypatch.setattr(Trainer, "losses", noting)
    trained(recipe, 2)
    assert len(seen) == 16
    run(replace(recipe, batch_size=4))
    first_epoch = [image.numpy().tobytes() for image in seen[:48]]
    whole = Trainer(replace(recipe, batch_size=48), CPU)
    (batch,) = whole.components.train_loader
    assert first_epoch == [image.numpy().tobytes() for image in batch.images]
    # 2 updates of 8 images, then 8 and 12 of 4: the schedule ends at the same rate
    assert column(recipe, "update")[-1] == "22"
    rates = [float(x) for x in column(recipe, "lr")]
    assert rates[0] == pytest.approx(1e-6 + 4 / 12 * (1e-3 - 1e-6))  # 4 of 12 warm-up updates
    assert rates[-1] == pytest.approx(
        1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 23 / 24)) / 2, rel=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16}, r"last.pt: batch_size: .* after 24 images .* to divide 24"),
        ({"seed": 1}, r"last.pt: seed: 0 when the loader stopped within epoch 0, now 1"),
        ({"accumulate": 2}, r"3 micro-batches .* optim.accumulate: 2; expected a divisor of 3"),
        ({"repeats": 3}, r"last.pt: repeats: 1 when"),
    ],
)
def test_an_epoch_in_another_order_is_refused(recipe, changes, message):
    trained(recipe, 3)
    repeats = changes.pop("repeats", 1)
    augment = replace(recipe.data.augment, repeats=repeats)
    other = changed(
        recipe,
        optim=dict(accumulate=changes.pop("accumulate", 1)),
        data=dict(augment=augment),
        **changes,
    )
    with pytest.raises(CheckpointError, match=message):
        run(other, "force")


def test_another_number_of_processes_is_noted(recipe):
    """One process resumes a run of two, with the same global batch and with a larger one."""
    last = trained(recipe, 2).store.last
    state = load(last)
    state["world_size"] = state["loader"]["world_size"] = 2
    state["recipe"]["batch_size"] = state["loader"]["batch_size"] = 4
    torch.save(state, last)
    trainer = Trainer(recipe, CPU)
    _, notes = trainer._resume("auto")
    assert trainer.batch == 2
    assert "processes: 2 -> 1 (8 images per update as before; drop-path draws" in notes
    _, notes = Trainer(replace(recipe, batch_size=16), CPU)._resume("auto")
    assert "8 -> 16 images per update: peak learning rate 0.002 -> 0.004, 3 updates per" in notes


def test_a_restart_by_torchrun_resumes_the_same_job(recipe):
    """It resumes from the job's last checkpoint, whatever --resume was given."""
    first = trained(replace(recipe, out=recipe.out + "-first"), 1).store.last
    job = replace(CPU, job="17")
    trainer = Trainer(recipe, job)
    assert trainer._resume(str(first))[0].startswith(f"resumed from {first}")
    trainer.run("auto", quiet=True)
    again = Trainer(recipe, job)
    for asked in (str(first), "never"):
        assert again._resume(asked)[0].startswith(f"resumed from {recipe.out}/last.pt")
    assert Trainer(recipe, CPU)._resume(str(first))[0].startswith(f"resumed from {first}")
    for other in (CPU, replace(CPU, job="18")):
        with pytest.raises(CheckpointError, match="resume: never, but"):
            Trainer(recipe, other)._resume("never")


def test_never_starts_a_new_run_and_replaces_no_checkpoint(alone):
    out = Path(alone.out)
    out.mkdir()
    (out / "notes.txt").write_text("kept")
    assert run(alone, "never").updates == 12
    for name, way in (
        ("last.pt", ", or --resume auto or force to continue this one"),
        ("best.pt", ""),
    ):
        before = (out / name).read_bytes()
        message = rf"resume: never, but .*{name} exists, .*another --out for a new run{way}$"
        with pytest.raises(CheckpointError, match=message):
            run(alone, "never")
        assert (out / name).read_bytes() == before
        (out / "last.pt").unlink(missing_ok=True)


def test_a_restart_by_torchrun_goes_on_after_a_kill_within_the_first_save(alone):
    """best.pt is written before last.pt; the restart was given --resume never as the start was."""
    job = replace(CPU, job="17")
    Trainer(alone, job).run("never", quiet=True)
    (Path(alone.out) / "last.pt").unlink()
    assert Trainer(alone, job)._resume("never") == []
    with pytest.raises(CheckpointError, match=r"best\.pt exists"):
        Trainer(alone, replace(CPU, job="18"))._resume("never")


def test_another_loader_is_noted(recipe, monkeypatch, capsys):
    """On a node where DALI is broken, `data.backend: auto` takes another loader."""
    monkeypatch.setattr(
        "featkd.data.dali.unsupported_reason", lambda *_: "a library of it is missing"
    )
    real = factory.build_loader_for
    monkeypatch.setattr(  # chooses as for a GPU, without needing one
        factory,
        "build_loader_for",
        lambda *a, **k: real(*a, **{**k, "device": torch.device("cuda")}),
    )
    with pytest.warns(UserWarning, match="timm loader instead of DALI: a library"):
        trainer = Trainer(changed(recipe, data=dict(backend="auto")), CPU)
    trainer.components.close()
    note = "using the timm loader instead of DALI: a library of it is missing"
    assert trainer.components.notes.count(note) == 1
    monkeypatch.undo()
    last = trained(recipe, 2).store.last
    torch.save({**load(last), "pixels": "dali on cuda"}, last)
    Trainer(recipe, CPU).run()
    output = capsys.readouterr().err
    assert "image loader: timm\n" in output
    assert "image loader: dali on cuda -> timm (pixels differ by rounding)" in output
    assert "random augmentation" not in output


@pytest.mark.parametrize("drawn", [True, False])
def test_a_checkpoint_of_earlier_draws_continues_with_a_note(recipe, capsys, drawn):
    """Checkpoints of version 1 do not hold a version."""
    if not drawn:
        recipe = changed(recipe, data=dict(augment=NOTHING_DRAWN))
    last = trained(recipe, 2).store.last
    state = load(last)
    assert state["loader"].pop("augmentation_version") == 2
    torch.save(state, last)
    assert Trainer(recipe, CPU).run().updates == 12
    output = capsys.readouterr().err
    note = "random augmentation: version 1 -> 2 of featkd's draws (the same images"
    assert (note in output) == drawn
