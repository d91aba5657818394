"""Self-distillation: the teacher is a trained student."""

from ...baselines.configs.deformable_detr_r50_50ep import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ...baselines.configs.deformable_detr_r50_50ep import model as _student
from ...baselines.configs.deformable_detr_r50_50ep import model as _teacher
from .common.distill import distill, teacher
from .common.objectives import detrdistill

model = distill(_student, _teacher, detrdistill())
train.output_dir = "./output/detrdistill_deformable_detr_r50_r50_50ep"
