"""Feature distillation in a plain torch loop, on one device or under DDP.

    python examples/plain_loop.py DATA --arch lift --epochs 100 --compile
    torchrun --nproc-per-node 4 examples/plain_loop.py DATA

DATA holds one folder of images per class.
"""

import argparse
import os
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder

from featkd.losses import DistillationLoss, ProjectedFeatureKD
from featkd.models import create_student, create_teacher

STUDENT = {"base": "deit_tiny_patch16_224"}
TEACHER = {"name": "cait_s24_224", "pretrained": True}


class Distiller(nn.Module):
    """Student and projector: one module to optimize, compile, wrap in DDP and save."""

    def __init__(self, student, teacher_dim, weight=0.2):
        super().__init__()
        self.student = student
        self.feature_loss = ProjectedFeatureKD(student.num_features, teacher_dim, metric="spectral")
        self.weight = weight

    def forward(self, images, labels, teacher_map):
        logits, (student_map,) = self.student.forward_with_features(images, layers=[-1])
        feature_loss = self.feature_loss(student_map, teacher_map)
        return F.cross_entropy(logits, labels) + self.weight * feature_loss


class PublishedDistiller(nn.Module):
    """Lift or WideLast with a published objective, CE + 0.2 MSE; their maps need no projector."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.loss = DistillationLoss(w_feat=0.2, feature="mse", label_smoothing=0.1)

    def forward(self, images, labels, teacher_map):
        logits, maps = self.student.forward_with_features(images, layers=[-1])
        return self.loss(logits, labels, None, maps, [teacher_map]).total


def train_epoch(model, teacher, loader, optimizer, scaler, amp, accumulate):
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    for number, (images, labels) in enumerate(loader, start=1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        is_update = number % accumulate == 0
        skip_sync = not is_update and isinstance(model, DistributedDataParallel)
        with model.no_sync() if skip_sync else nullcontext():
            with torch.autocast(device.type, dtype=amp):
                with torch.no_grad():
                    _, (teacher_map,) = teacher.forward_with_features(images, layers=[-1])
                loss = model(images, labels, teacher_map)
            scaler.scale(loss / accumulate).backward()
        if is_update:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # includes the projector
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--arch", default="plain", choices=["plain", "lift", "widelast"])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="images per process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per update")
    parser.add_argument("--amp", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", default="student.pt")
    options = parser.parse_args(words)

    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    is_distributed = "LOCAL_RANK" in os.environ
    if is_distributed:
        torch.distributed.init_process_group()

    teacher = create_teacher(**TEACHER, img_size=options.img_size).to(device)
    config = resolve_model_data_config(teacher)  # normalise as the teacher's training did
    size = (3, options.img_size, options.img_size)
    transform = create_transform(size, is_training=True, mean=config["mean"], std=config["std"])
    images = ImageFolder(options.data, transform)
    sampler = DistributedSampler(images) if is_distributed else None
    loader = DataLoader(
        images,
        options.batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )

    student = create_student(
        **STUDENT,
        arch=options.arch,
        teacher_dim=teacher.num_features,
        num_classes=len(images.classes),
        img_size=options.img_size,
    )
    if options.arch == "plain":
        model = Distiller(student, teacher.num_features).to(device)
    else:
        model = PublishedDistiller(student).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    if options.compile:  # before DDP; the teacher's forward pass takes most of a step
        teacher.forward_with_features = torch.compile(teacher.forward_with_features)
        model.compile(fullgraph=True)
    if is_distributed:
        model = DistributedDataParallel(
            model, device_ids=None if device.type == "cpu" else [device]
        )

    amp = getattr(torch, options.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    for epoch in range(options.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        train_epoch(model, teacher, loader, optimizer, scaler, amp, options.accumulate)
    if not is_distributed or torch.distributed.get_rank() == 0:
        torch.save(student.state_dict(), options.out)  # without the projector
    if is_distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
