"""Feature distillation in Lightning.

    python examples/lightning_module.py DATA --epochs 100

DATA holds one folder of images per class.
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from featkd.losses import ProjectedFeatureKD
from featkd.models import create_student, create_teacher

STUDENT = {"base": "deit_tiny_patch16_224"}
TEACHER = {"name": "cait_s24_224", "pretrained": True}


class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher, lr=5e-4):
        super().__init__()
        self.student = student
        self.feature_loss = ProjectedFeatureKD(
            student.num_features, teacher.num_features, metric="spectral"
        )
        # inside a list the teacher is no submodule: not saved, not trained, not in DDP
        self.frozen = [teacher]
        self.lr = lr

    def on_fit_start(self):
        self.frozen[0].to(self.device)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        with torch.no_grad():
            _, (teacher_map,) = self.frozen[0].forward_with_features(images, layers=[-1])
        logits, (student_map,) = self.student.forward_with_features(images, layers=[-1])
        feature_loss = self.feature_loss(student_map, teacher_map)
        loss = F.cross_entropy(logits, labels) + 0.2 * feature_loss
        self.log_dict({"loss": loss, "feature_loss": feature_loss}, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per update")
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args(words)

    teacher = create_teacher(**TEACHER, img_size=options.img_size)
    config = resolve_model_data_config(teacher)  # normalise as the teacher's training did
    size = (3, options.img_size, options.img_size)
    transform = create_transform(size, is_training=True, mean=config["mean"], std=config["std"])
    images = ImageFolder(options.data, transform)
    student = create_student(**STUDENT, num_classes=len(images.classes), img_size=options.img_size)
    loader = DataLoader(
        images, options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True
    )
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        precision="bf16-mixed",
        accumulate_grad_batches=options.accumulate,
    )
    trainer.fit(Distillation(student, teacher), loader)


if __name__ == "__main__":
    main()
