"""timm's train.py with feature distillation on patch-token maps.

    PYTHONPATH=/path/to/pytorch-image-models torchrun --nproc-per-node 4 examples/timm_train.py \\
        --data-dir DATA --model deit_tiny_patch16_224 --amp --kd-model-name cait_s24_224 \\
        --kd-distill-type feature --task-loss-weight 1 --distill-loss-weight 0.2

train.py is in the root of timm's repository, not in its package. Its own feature distillation
matches one pooled vector per image; `MapDistillationTask` takes its place.
"""

import timm.task
import torch
import train
from timm.task.distillation import FeatureDistillationTrainableModule

from featkd.functional import projected_feature_kd
from featkd.losses import ProjectedFeatureKD
from featkd.models import with_features

METRIC = "spectral"


class MapModule(FeatureDistillationTrainableModule):
    """Student and projector: the module that train.py optimizes, averages, wraps and saves."""

    def forward(self, images, teacher_map):
        logits, (student_map,) = self.student.forward_with_features(images, layers=[-1])
        if self.projection is None:
            return logits, projected_feature_kd(student_map, teacher_map, metric=METRIC)
        return logits, self.projection(student_map, teacher_map)


class MapDistillationTask(timm.task.FeatureDistillationTask):
    """Feature distillation between the last layers' patch-token maps."""

    def __init__(self, student_model, teacher_model, **options):
        super().__init__(with_features(student_model), teacher_model, **options)
        self.teacher_forward = with_features(self.teacher.model).forward_with_features
        self.teacher.requires_grad_(False)
        projector = None
        linear = self.trainable_module.projection  # timm's projector; None if the widths are equal
        if linear is not None:
            widths = linear.in_features, linear.out_features
            projector = ProjectedFeatureKD(*widths, metric=METRIC).to(self.device, self.dtype)
        self.trainable_module = MapModule(student_model, projector)

    def compile(self, **options):
        self.teacher_forward = torch.compile(self.teacher_forward, **options)
        return super().compile(**options)

    def forward(self, input, target):
        with torch.no_grad():
            images = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            _, (teacher_map,) = self.teacher_forward(images, layers=[-1])
        output, kd_loss = self.trainable_module(input, teacher_map)
        task_loss = self.criterion(output, target)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


train.FeatureDistillationTask = MapDistillationTask

if __name__ == "__main__":
    train.main()
