"""The scripts in examples/ train, and the notebook runs.

The scripts run as they are, on few small images, with small models of random weights.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import featkd
from featkd.models import create_student, create_teacher

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = 4
STUDENT = {"base": "deit_tiny_patch16_224", "depth": 2}
TEACHER = {"name": "cait_s24_224", "depth": 1}


def example(name: str) -> Any:
    """A script as a module, with small models."""
    module = types.ModuleType(f"example_{name}")
    path = EXAMPLES / f"{name}.py"
    exec(compile(path.read_text(), path, "exec"), vars(module))
    module.STUDENT, module.TEACHER = STUDENT, TEACHER  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of 32 x 32 pixels; their brightness tells the class."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(16):
        label = number % CLASSES
        place = folder / f"class {label}"
        place.mkdir(exist_ok=True)
        pixels = random.integers(60 * label, 60 * label + 60, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def kept_calls(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Arguments and result of each call of a function, from now on."""
    function, calls = getattr(owner, name), list[tuple[Any, Any]]()

    @functools.wraps(function)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, keeping)
    return calls


def assert_trained(module: nn.Module, optimizer: torch.optim.Optimizer, projector: str) -> None:
    """Checks that every parameter has had a gradient, and that nothing else is optimized."""
    named = dict(module.named_parameters())
    assert projector in named
    inside = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in inside} == {id(p) for p in named.values()}
    for name, parameter in named.items():
        assert optimizer.state[parameter]["exp_avg"].abs().max() > 0, name


def assert_falls(losses: list[float], per_epoch: int) -> None:
    assert all(loss == loss and abs(loss) < 1e6 for loss in losses)
    assert sum(losses[-per_epoch:]) < sum(losses[:per_epoch])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


WORDS = ["--img-size", "32", "--batch-size", "4", "--workers", "0"]


def test_plain_loop(images, tmp_path, monkeypatch):
    """In float16, which uses the scaler; the test of two processes runs bfloat16."""
    module = example("plain_loop")
    scaled = kept_calls(torch.amp.GradScaler, "scale", monkeypatch)
    epochs = kept_calls(module, "train_epoch", monkeypatch)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    words = ["--epochs", "8", "--accumulate", "2", "--amp", "float16", "--compile"]
    module.main([str(images), *WORDS, *words, "--out", str(tmp_path / "student.pt")])
    assert len(epochs) == 8
    assert_falls([float(args[1].detach()) for args, _ in scaled], per_epoch=4)
    (model, _, _, optimizer, scaler, *_), _ = epochs[-1]
    assert_trained(model, optimizer, "feature_loss.proj.weight")
    assert scaler.is_enabled()
    assert featkd.last_backend("projected_feature_kd") == "reference"
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {16}  # 8 epochs of 4 batches, two batches per update
    saved = torch.load(tmp_path / "student.pt")
    assert saved.keys() == model.student.state_dict().keys()
    assert torch.equal(saved["head.weight"], model.student.head.weight)


@pytest.mark.parametrize("arch", ["lift", "widelast"])
def test_plain_loop_without_projector(arch, images, tmp_path, monkeypatch):
    module = example("plain_loop")
    epochs = kept_calls(module, "train_epoch", monkeypatch)
    losses = kept_calls(module.PublishedDistiller, "forward", monkeypatch)
    words = ["--arch", arch, "--epochs", "4", "--out", str(tmp_path / "student.pt")]
    module.main([str(images), *WORDS, *words])
    assert_falls([float(loss.detach()) for _, loss in losses], per_epoch=4)
    (model, _, _, optimizer, *_), _ = epochs[-1]
    assert_trained(model, optimizer, "student.head.weight")


def in_one_of_two_processes() -> None:
    rank, folder, images = os.environ["RANK"], *sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(int(rank))  # DDP makes the weights of its modules equal
    module = example("plain_loop")
    with pytest.MonkeyPatch.context() as monkeypatch:
        epochs = kept_calls(module, "train_epoch", monkeypatch)
        module.main(
            [images, *WORDS, "--epochs", "1", "--accumulate", "2", "--out", f"{folder}/student.pt"]
        )
    (model, *_), _ = epochs[0]
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")


def test_two_processes_train_one_projector(images, tmp_path, server):
    script = "from tests.test_examples import *; in_one_of_two_processes()"
    for rank in server.ranks(2, tmp_path, images, script=script):
        assert rank.wait() == 0, rank.stderr
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert "feature_loss.proj.weight" in one
    assert not [name for name in one if "teacher" in name]
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def timm_main(student: nn.Module, teacher: nn.Module, found: dict[str, Any]) -> Any:
    """Function that uses a task as timm's train.py does."""
    from timm.optim import create_optimizer_v2

    train = sys.modules["train"]

    def main() -> None:
        task = train.FeatureDistillationTask(  # type: ignore[attr-defined]
            student_model=student,
            teacher_model=teacher,
            criterion=nn.CrossEntropyLoss(),
            distill_loss_weight=0.2,
            task_loss_weight=1.0,
            student_feature_dim=None,
            teacher_feature_dim=None,
            device=torch.device("cpu"),
            dtype=None,
            verbose=False,
        )
        module = task.get_trainable_module()
        optimizer = create_optimizer_v2(module, opt="adamw", lr=5e-4, weight_decay=0.05)
        task.setup_ema(decay=0.9)
        task.compile(backend="eager", mode=None)
        task.prepare_distributed(device_ids=None)
        task.get_trainable_module().train()
        losses = []
        labels = torch.arange(8) % CLASSES
        images = torch.randn(8, 3, 32, 32) + labels[:, None, None, None]
        for step in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = task(images, labels)
            result["loss"].backward()
            assert len(list(task.get_clip_parameters())) == len(list(module.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=step)
            losses.append(float(result["loss"].detach()))
        state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
        found.update(task=task, module=module, optimizer=optimizer, losses=losses, state=state)

    return main


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("arch", ["plain", "widelast"])
def test_timm_task(arch, monkeypatch, one_process_group):
    import timm

    options = {"img_size": 32, "num_classes": CLASSES}
    model = timm.create_model(
        "deit_tiny_patch16_224" if arch == "plain" else "deit_tiny_widelast384_patch16_224",
        **options,
        depth=2,
    )
    keys = set(model.state_dict())
    found: dict[str, Any] = {}
    train = types.ModuleType("train")
    monkeypatch.setitem(sys.modules, "train", train)
    teacher = create_teacher(**TEACHER, **options)  # type: ignore[arg-type]
    train.main = timm_main(model, teacher, found)  # type: ignore[attr-defined]
    runpy.run_path(str(EXAMPLES / "timm_train.py"), run_name="__main__")
    assert_falls(found["losses"], per_epoch=1)
    projector = "projection.proj.weight" if arch == "plain" else "student.head.weight"
    assert_trained(found["module"], found["optimizer"], projector)
    for ema in ("", "_ema"):
        assert set(found["state"][f"state_dict{ema}"]) == keys
        assert (f"task_state{ema}" in found["state"]) == (arch == "plain")
    undecayed = [
        p for g in found["optimizer"].param_groups if not g["weight_decay"] for p in g["params"]
    ]
    assert any(p is model.pos_embed for p in undecayed)


def test_lightning(images, tmp_path, monkeypatch):
    import lightning

    monkeypatch.chdir(tmp_path)
    module = example("lightning_module")
    losses = kept_calls(module.Distillation, "training_step", monkeypatch)
    fits = kept_calls(lightning.Trainer, "fit", monkeypatch)
    module.main([str(images), *WORDS, "--epochs", "4", "--accumulate", "2"])
    assert_falls([float(loss.detach()) for _, loss in losses], per_epoch=4)
    (trainer, trained, _), _ = fits[0]
    assert trainer.global_step == 8
    assert_trained(trained, trainer.optimizers[0], "feature_loss.proj.weight")
    (teacher,) = trained.frozen
    assert not teacher.training
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"student", "feature_loss"}
    student = create_student(**STUDENT, img_size=32, num_classes=CLASSES)  # type: ignore[arg-type]
    loaded = module.Distillation.load_from_checkpoint(checkpoint, student=student, teacher=teacher)
    assert torch.equal(loaded.feature_loss.proj.weight, trained.feature_loss.proj.weight)


def save_hugging_face_vit(folder: Path, width: int) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=32,
        num_labels=7,  # not those of the images, as with downloaded weights
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def test_hugging_face_trainer(images, tmp_path, monkeypatch):
    from safetensors.torch import load_file
    from transformers import Trainer, ViTForImageClassification

    module = example("hf_trainer")
    for name, width in (("STUDENT", 32), ("TEACHER", 48)):
        setattr(module, name, str(tmp_path / name))
        save_hugging_face_vit(tmp_path / name, width)
    losses = kept_calls(module.DistillationTrainer, "compute_loss", monkeypatch)
    runs = kept_calls(Trainer, "train", monkeypatch)
    classified = kept_calls(ViTForImageClassification, "forward", monkeypatch)
    out = tmp_path / "runs"
    words = ["--epochs", "4", "--batch-size", "4", "--accumulate", "2"]
    module.main([str(images), *words, "--cpu", "--out", str(out)])
    ((trainer,), _) = runs[0]
    teacher, student = trainer.teacher, trainer.model.student
    dtypes = {outputs.logits.dtype for (model, *_), outputs in classified if model is teacher}
    assert dtypes == {torch.bfloat16}
    # otherwise accumulated losses would not be averaged
    assert not trainer.model_accepts_loss_kwargs
    assert_falls([float(loss.detach()) for _, loss in losses], per_epoch=4)
    assert_trained(trainer.model, trainer.optimizer.optimizer, "feature_loss.proj.weight")
    assert not teacher.training
    (saved,) = out.glob("checkpoint-8/model.safetensors")
    assert {name.split(".")[0] for name in load_file(saved)} == {"student", "feature_loss"}
    again = ViTForImageClassification.from_pretrained(out / "student")
    assert torch.equal(again.classifier.weight, student.classifier.weight)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


@pytest.mark.slow
def test_notebook(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "digits.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    accuracies = dict(re.findall(r"^(plain|lift) .* ([\d.]+) %$", printed, flags=re.MULTILINE))
    assert float(accuracies["lift"]) > 75
    assert f"loaded again: {accuracies['lift']} %" in printed
    assert "low rank" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
