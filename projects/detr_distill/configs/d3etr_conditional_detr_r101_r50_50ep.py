from ...baselines.configs.conditional_detr_r50_50ep import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ...baselines.configs.conditional_detr_r50_50ep import model as _student
from ...baselines.configs.conditional_detr_r101_50ep import model as _teacher
from .common.distill import distill, teacher
from .common.objectives import mixed_matching

model = distill(_student, _teacher, mixed_matching())
model.student.transformer.decoder.checkpoint_layers = True  # makes room for the second group
train.output_dir = "./output/d3etr_conditional_detr_r101_r50_50ep"
