"""Feature distillation with the Hugging Face Trainer.

    python examples/hf_trainer.py DATA --epochs 100

DATA holds one folder of images per class. Hugging Face's ViTs return the raw output of each block
in `hidden_states`, with the class token first.
"""

import argparse

import torch
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import AutoImageProcessor, Trainer, TrainingArguments, ViTForImageClassification

from featkd.losses import ProjectedFeatureKD

STUDENT = "facebook/deit-tiny-patch16-224"
TEACHER = "google/vit-base-patch16-224"


class StudentWithProjector(nn.Module):
    def __init__(self, student, teacher_dim):
        super().__init__()
        self.student = student
        self.feature_loss = ProjectedFeatureKD(
            student.config.hidden_size, teacher_dim, metric="spectral"
        )

    # without **kwargs the Trainer treats the loss as a batch mean and divides it when accumulating
    def forward(self, pixel_values, labels, teacher_map=None):
        outputs = self.student(pixel_values, labels=labels, output_hidden_states=True)
        loss = outputs.loss
        if teacher_map is not None:
            student_map = outputs.hidden_states[-1][:, 1:]  # without the class token
            loss = loss + 0.2 * self.feature_loss(student_map, teacher_map)
        return {"loss": loss, "logits": outputs.logits}


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if model.training:
            # the Trainer applies autocast inside the trained model only
            with torch.no_grad(), self.accelerator.autocast():
                found = self.teacher(inputs["pixel_values"], output_hidden_states=True)
            inputs = {**inputs, "teacher_map": found.hidden_states[-1][:, 1:]}
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def collate(samples):
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per update")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", default="runs/hf")
    options = parser.parse_args(words)

    teacher = ViTForImageClassification.from_pretrained(TEACHER)
    processor = AutoImageProcessor.from_pretrained(TEACHER)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(teacher.config.image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            # normalise as the teacher's training did
            transforms.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    images = ImageFolder(options.data, transform)
    student = ViTForImageClassification.from_pretrained(
        STUDENT, num_labels=len(images.classes), ignore_mismatched_sizes=True
    )
    trainer = DistillationTrainer(
        model=StudentWithProjector(student, teacher.config.hidden_size),
        teacher=teacher,
        args=TrainingArguments(
            options.out,
            bf16=True,
            dataloader_drop_last=True,
            gradient_accumulation_steps=options.accumulate,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            remove_unused_columns=False,
            use_cpu=options.cpu,
        ),
        data_collator=collate,
        train_dataset=images,
    )
    trainer.train()
    student.save_pretrained(f"{options.out}/student")


if __name__ == "__main__":
    main()
