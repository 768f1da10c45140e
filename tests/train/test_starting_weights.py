"""Runs whose student starts from weights: featkd's checkpoints, other files, timm's weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from featkd.cli.main import main
from featkd.runtime.remote import locate
from featkd.train.checkpoint import load
from featkd.train.recipe import Recipe, RecipeError, StudentConfig, to_dict, to_yaml
from featkd.train.recipe_file import load_recipe
from featkd.train.trainer import Trainer
from tests.conftest import TINY
from tests.train.runs import CPU, changed, column, run, same_weights


def short(recipe: Recipe, epochs: int = 1, **student: Any) -> Recipe:
    """`recipe` with other fields of its student, for one epoch of 6 updates."""
    return changed(recipe, student=dict(**student), optim=dict(epochs=epochs, warmup_epochs=0))


@pytest.fixture(name="base")
def _base(alone: Recipe) -> Path:
    """Checkpoint of a plain run of featkd."""
    recipe = short(alone, arch="plain")
    run(replace(recipe, out=recipe.out + "-base"))
    return Path(recipe.out + "-base") / "last.pt"


@pytest.mark.parametrize("arch", ["plain", "lift", "widelast"])
def test_a_run_starts_from_a_checkpoint_of_featkd(recipe, base, arch):
    started = short(recipe, arch=arch, checkpoint=str(base), weights="model")
    trainer = Trainer(started, CPU)
    found, weights = trainer.components.student.state_dict(), load(base)["model"]
    kept = {"plain": "", "lift": "blocks."}.get(arch, "blocks.0.")
    names = [name for name in found if name.startswith((kept, "patch_embed", "pos_embed"))]
    assert len(names) >= 12
    assert all(torch.equal(found[name], weights[name]) for name in names)
    (note,) = [x for x in trainer.components.notes if "starts from" in x]
    assert note.startswith(f"student: starts from {base}")
    assert ("new: " in note) == (arch != "plain")
    if arch == "widelast":
        assert "copied: blocks 0 to 0 and the embeddings; new: blocks.1, norm, head" in note
    run(started)
    again = load(Path(started.out) / "last.pt")["model"]
    assert not torch.equal(again["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"])
    assert len(column(started, "feature_loss")) == 6


def test_a_resumed_run_does_not_read_its_starting_weights(recipe, base, capsys):
    whole = short(recipe, 2, checkpoint=str(base))
    half = changed(whole, optim=dict(epochs=1))
    run(half)
    base.unlink()
    assert run(whole).updates == 12
    last = Path(recipe.out) / "last.pt"
    missing = changed(whole, optim=dict(epochs=3))
    without = short(missing, 3, checkpoint=None)
    capsys.readouterr()
    Trainer(without, CPU).run()
    text = capsys.readouterr().err
    assert re.search(r"changed since that checkpoint: student.checkpoint: '.*' -> null", text), text
    copy = Path(recipe.out + "-copy.pt")
    copy.write_bytes(last.read_bytes())
    more = replace(missing, out=recipe.out + "-more", optim=replace(whole.optim, epochs=4))
    with pytest.raises(RecipeError, match=r"student\.checkpoint: no file"):
        Trainer(more, CPU)
    file = Path(more.out + ".yaml")
    file.write_text(to_yaml(more))
    assert main(["distill", str(file), "--resume", str(copy), "--quiet"]) == 0


def test_pretrained_and_checkpoint_draw_the_same_numbers(recipe, tmp_path):
    """Weights of the base don't change what is initialised, augmented or dropped."""
    options = dict(TINY, img_size=16)
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=7, **options).state_dict()
    torch.save(weights, tmp_path / "base.pth")
    overlay = {"file": str(tmp_path / "base.pth"), "num_classes": 7}
    one = short(recipe, checkpoint=str(tmp_path / "base.pth"))
    given = {**recipe.student.options, "pretrained_cfg_overlay": overlay}
    other = replace(short(recipe, pretrained=True, options=given), out=recipe.out + "-other")
    run(one)
    run(other)
    assert same_weights(Path(one.out) / "last.pt", Path(other.out) / "last.pt")


@pytest.mark.parametrize(
    ("fields", "start", "note"),
    [
        ({}, "data.mean", None),
        ({}, "student.base", None),
        (
            *({"data": {"mean": (0.5, 0.5, 0.5)}}, "data.mean"),
            r"data.mean \[0.485, .*has \[0.5, 0.5, 0.5\]",
        ),
        (  # shows in no tensor's shape
            *({"student": {"options": TINY | {"num_heads": 2}}}, "student.base"),
            "'num_heads': 3}; this run has .*'num_heads': 2",
        ),
    ],
)
def test_another_origin_of_the_starting_weights_is_noted(recipe, base, fields, start, note):
    recipe = changed(short(recipe, checkpoint=str(base)), **fields)
    notes = Trainer(recipe, CPU).components.notes
    found = [x for x in notes if f"last.pt: was trained with {start}" in x]
    assert len(found) == (note is not None)
    assert note is None or re.search(note, found[0])


def test_starting_weights_behind_a_url(recipe, base):
    place = locate("memory://starts/last.pt")
    place.replace_with(base.read_bytes())
    trainer = Trainer(short(recipe, checkpoint=str(place), weights="model"), CPU)
    found, name = trainer.components.student.state_dict(), "blocks.0.attn.qkv.weight"
    assert torch.equal(found[name], load(base)["model"][name])


@pytest.mark.parametrize(
    ("base", "arch"), [("vit_small_patch16_dinov3", "widelast"), ("eva02_tiny_patch14_224", "lift")]
)
def test_students_on_eva_are_trained_and_resumed(recipe, base, arch):
    options = {**TINY, "embed_dim": 24, "drop_path_rate": 0.2}
    student = {"base": base, "arch": arch, "teacher_dim": 48, "options": options}
    whole = short(
        changed(
            recipe,
            teacher=dict(options={**recipe.teacher.options, "embed_dim": 48}),
            checkpoint=dict(keep_every=1),
        ),
        2,
        **student,
    )
    run(whole)
    losses = column(whole, "loss")
    assert len(losses) == 12
    again = replace(whole, out=recipe.out + "-again")
    run(again, f"{whole.out}/epoch-0001.pt")
    assert column(again, "loss") == losses[6:]


def test_a_student_and_a_teacher_from_a_folder_of_timm(recipe, tmp_path):
    options = dict(TINY, img_size=16, num_classes=3)
    model = timm.create_model("deit_tiny_patch16_224", **options)
    save_for_hf(model, tmp_path / "hub", model_args=options, safe_serialization=True)
    name = f"local-dir:{tmp_path / 'hub'}"
    started = short(recipe, base=name, arch="plain", pretrained=True, options={})
    teacher = replace(recipe.teacher, name=name, pretrained=True, random=False, options={})
    trainer = Trainer(replace(started, teacher=teacher), CPU)
    for found in (trainer.components.student, trainer.components.teacher_model):
        state = found.state_dict()
        assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())
    trainer.components.student.train()
    assert trainer.step([next(iter(trainer.components.train_loader))]).total.isfinite()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--student.checkpoint", "nowhere.pth"), r"student\.checkpoint: no file 'nowhere.pth'"),
        (("--student.checkpoint", "{text}"), r"student\.checkpoint: \S+ is not a weight file"),
        (
            ("--student.checkpoint", "{base}", "--student.options.depth", "3"),
            r"student\.checkpoint: \S+last\.pt does not fit vit_tiny.* missing: blocks\.2\..*It is "
            r"a checkpoint of featkd of student.base: vit_tiny_patch16_224, student.arch: plain",
        ),
        (
            ("--student.checkpoint", "{base}", "--student.pretrained", "true"),
            r"student\.checkpoint: .* but student.pretrained is true; expected one of them",
        ),
        (
            ("--student.base", "vit_tiny_patch16_224.nothing", "--student.pretrained", "true"),
            r"student\.base: timm has no weights 'vit_tiny_patch16_224.nothing'",
        ),
        (
            ("--student.base", "local-dir:nowhere"),
            r"student\.base: 'local-dir:nowhere': no file nowhere/config.json",
        ),
        (("--student.base", "cait_xxs24_224"), r"student\.base: arch 'widelast' needs .* got Cait"),
    ],
)
def test_bad_starting_weights_end_a_run_with_one_line(
    recipe_file, base, tmp_path, capsys, words, message
):
    (tmp_path / "text.pth").write_text("no weights")
    given = [word.format(base=base, text=tmp_path / "text.pth") for word in words]
    assert main(["distill", str(recipe_file), "--out", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.match(f"featkd: {message}", error), error
    assert not (tmp_path / "out").exists()


def test_recipes_and_checkpoints_of_earlier_versions(alone, tmp_path, monkeypatch):
    """They have pretrained among the options."""
    file = tmp_path / "recipe.yaml"
    file.write_text("student: {options: {pretrained: true, depth: 2}}\n")
    student = load_recipe(file).student
    assert student.pretrained
    assert student.options == {"depth": 2}
    assert not StudentConfig(options={"pretrained": False}).pretrained
    with pytest.raises(RecipeError, match=r"student.options.pretrained: False, but student.pretr"):
        StudentConfig(pretrained=True, options={"pretrained": False})

    run(short(alone, arch="plain"))
    last = Path(alone.out) / "last.pt"
    state = torch.load(last, weights_only=True)
    saved = state["recipe"]["student"]
    assert saved == to_dict(short(alone, arch="plain"))["student"]
    for name in ("pretrained", "checkpoint", "weights"):
        del saved[name]
    saved["options"]["pretrained"] = True
    torch.save(state, last)
    options = {**alone.student.options, "pretrained": True}
    assert run(short(alone, 2, arch="plain", options=options)).updates == 12
