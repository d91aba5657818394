"""Self-distillation: the teacher is a trained student."""

from ...baselines.configs.adamixer_r50_1x_100query import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ...baselines.configs.adamixer_r50_1x_100query import model as _student
from ...baselines.configs.adamixer_r50_1x_100query import model as _teacher
from .common.distill import distill, teacher
from .common.objectives import detrdistill

model = distill(_student, _teacher, detrdistill())
train.output_dir = "./output/detrdistill_adamixer_r50_r50_12ep"
