"""The code of docs/embedding.md trains in a plain loop, with DDP, timm, Lightning and HF.

The replacements below make the models small. Each must occur once in the page.
"""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import featkd
from featkd.models import create_student, create_teacher

PAGE = Path(__file__).parents[1] / "docs" / "embedding.md"
CLASSES = 5
SMALL: dict[str, Any] = {"img_size": 32, "num_classes": CLASSES}
SMALLER = {
    "pretrained=True": f"img_size=32, depth=1, num_classes={CLASSES}",
    "num_classes=1000": f"img_size=32, depth=2, num_classes={CLASSES}",
    # inductor is slow
    "model.compile(fullgraph=True)": 'model.compile(fullgraph=True, backend="eager")',
    "torch.compile(teacher.forward_with_features)": (
        'torch.compile(teacher.forward_with_features, backend="eager")'
    ),
    "range(300)": "range(4)",
}


def sections() -> dict[str, list[str]]:
    """Code blocks by heading."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return {
        title: re.findall(r"^```python\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def replaced(code: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


def execute(title: str, replacements: dict[str, str], **names: Any) -> dict[str, Any]:
    """Runs the code of a section; a plain loop needs the code of another section first."""
    found = {"__name__": "__main__", **names}
    blocks = sections()
    if title == "A plain loop":
        exec(compile("\n".join(blocks["The module that is trained"]), str(PAGE), "exec"), found)
    (code,) = blocks[title]
    exec(compile(replaced(code, replacements), str(PAGE), "exec"), found)
    return found


def images_and_labels(count: int = 16, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return TensorDataset(noise + labels[:, None, None, None], labels)


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


@pytest.fixture
def student() -> Any:
    torch.manual_seed(0)
    return create_student("deit_tiny_patch16_224", depth=2, **SMALL)


@pytest.fixture
def teacher() -> Any:
    torch.manual_seed(1)
    return create_teacher("cait_s24_224", depth=1, **SMALL)


def test_page_has_only_tested_sections():
    assert {title: len(blocks) for title, blocks in sections().items()} == {
        "The module that is trained": 2,
        "A plain loop": 1,
        "timm's train.py": 1,
        "Lightning": 1,
        "Hugging Face Trainer": 1,
    }


def test_plain_loop(monkeypatch):
    """In float16, which uses the scaler; `test_two_processes_...` runs the page's bfloat16."""
    losses: list[float] = []
    scale = torch.amp.GradScaler.scale

    def recording(scaler: Any, loss: Tensor) -> Tensor:
        losses.append(float(loss.detach()))
        return scale(scaler, loss)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", recording)
    torch.manual_seed(0)
    loader = DataLoader(images_and_labels(), batch_size=4)
    names = execute(
        "A plain loop", {**SMALLER, "amp = torch.bfloat16": "amp = torch.float16"}, loader=loader
    )
    assert len(losses) == 16
    assert_falls(losses, per_epoch=4)
    assert_trained(names["model"], names["optimizer"], "feature_loss.proj.weight")
    assert names["scaler"].is_enabled()
    assert featkd.last_backend("projected_feature_kd") == "reference"
    steps = {int(state["step"]) for state in names["optimizer"].state.values()}
    assert steps == {8}  # 4 epochs of 4 batches, two batches per update


def test_published_objective(student, teacher):
    del student
    names: dict[str, Any] = {}
    exec("\n".join(sections()["The module that is trained"]), names)
    widelast = create_student("deit_tiny_patch16_224", "widelast", 384, depth=2, **SMALL)
    model = names["PublishedDistiller"](widelast)
    images, labels = images_and_labels().tensors
    with torch.no_grad():
        logits, (teacher_map,) = teacher.forward_with_features(images, [-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for _ in range(4):
        loss = model(images, labels, logits, teacher_map)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert_falls(losses, per_epoch=1)
    assert_trained(model, optimizer, "student.blocks.1.proj_in.weight")


def in_one_of_two_processes() -> None:
    rank, folder = int(os.environ["RANK"]), sys.argv[1]
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # DDP makes the weights of its modules equal
    loader = DataLoader(images_and_labels(seed=rank), batch_size=4)
    uncompiled = {
        "model.compile(fullgraph=True)": "...",
        "torch.compile(teacher.forward_with_features)": "teacher.forward_with_features",
    }
    smaller = {**SMALLER, **uncompiled, "range(300)": "range(1)"}
    names = execute("A plain loop", smaller, loader=loader)
    assert isinstance(names["model"], nn.parallel.DistributedDataParallel)
    torch.save(names["model"].module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_one_projector(tmp_path, server):
    script = "from tests.test_embedding import *; in_one_of_two_processes()"
    for rank in server.ranks(2, tmp_path, script=script):
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
        for step in range(4):
            images, labels = images_and_labels().tensors
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
def test_timm_task(arch, teacher, monkeypatch, one_process_group):
    import timm

    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": CLASSES, "depth": 2}
    model = timm.create_model(
        "deit_tiny_patch16_224" if arch == "plain" else "deit_tiny_widelast384_patch16_224",
        **options,
    )
    keys = set(model.state_dict())
    found: dict[str, Any] = {}
    train = types.ModuleType("train")
    monkeypatch.setitem(sys.modules, "train", train)
    train.main = timm_main(model, teacher, found)  # type: ignore[attr-defined]
    execute("timm's train.py", {})
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


def test_lightning(student, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = execute(
        "Lightning",
        {"max_epochs=300": "max_epochs=4, log_every_n_steps=1, logger=Keep()"},
        student=student,
        teacher=teacher,
        loader=DataLoader(images_and_labels(), batch_size=4),
        Keep=kept_losses(),
    )
    trainer = names["trainer"]
    assert_falls([row["loss"] for row in trainer.logger.rows], per_epoch=2)
    module = trainer.lightning_module
    assert trainer.global_step == 8
    assert_trained(module, trainer.optimizers[0], "feature_loss.proj.weight")
    assert not teacher.training
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"student", "feature_loss"}
    loaded = names["Distillation"].load_from_checkpoint(
        checkpoint, student=student, teacher=teacher
    )
    assert torch.equal(loaded.feature_loss.proj.weight, module.feature_loss.proj.weight)


def kept_losses() -> Any:
    from lightning.pytorch.loggers.logger import DummyLogger

    class Keep(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append(metrics)

    return Keep


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, data: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.rows = [{"pixel_values": image, "labels": label} for image, label in data]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def hugging_face_vit(width: int, seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=32,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def test_hugging_face_trainer(tmp_path, monkeypatch):
    from safetensors.torch import load_file
    from transformers import ViTForImageClassification

    monkeypatch.chdir(tmp_path)
    student, teacher = hugging_face_vit(32, 0), hugging_face_vit(48, 1)
    dtypes = set()
    teacher.classifier.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    names = execute(
        "Hugging Face Trainer",
        {
            "bf16=True": "bf16=True, use_cpu=True, logging_steps=1, num_train_epochs=4, "
            "per_device_train_batch_size=4, learning_rate=1e-3, report_to='none'"
        },
        student=student,
        teacher=teacher,
        dataset=Rows(images_and_labels()),
    )
    trainer = names["trainer"]
    assert dtypes == {torch.bfloat16}
    # otherwise accumulated losses would not be averaged
    assert not trainer.model_accepts_loss_kwargs
    assert_falls([row["loss"] for row in trainer.state.log_history if "loss" in row], per_epoch=2)
    assert_trained(trainer.model, trainer.optimizer.optimizer, "feature_loss.proj.weight")
    assert not teacher.training
    (saved,) = tmp_path.rglob("checkpoint-8/model.safetensors")
    assert {name.split(".")[0] for name in load_file(saved)} == {"student", "feature_loss"}
    again = ViTForImageClassification.from_pretrained(tmp_path / "runs" / "hf" / "student")
    assert torch.equal(again.classifier.weight, student.classifier.weight)
    assert trainer.evaluate(Rows(images_and_labels()))["eval_loss"] > 0
