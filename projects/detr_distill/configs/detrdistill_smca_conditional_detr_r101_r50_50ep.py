"""A single-scale SMCA student learns from a Conditional-DETR teacher."""

from ...baselines.configs.conditional_detr_r101_50ep import model as _teacher
from ...smca.configs.smca_single_scale_r50_50ep import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ...smca.configs.smca_single_scale_r50_50ep import model as _student
from .common.distill import distill, teacher
from .common.objectives import detrdistill

model = distill(_student, _teacher, detrdistill("memory"))
train.output_dir = "./output/detrdistill_smca_conditional_detr_r101_r50_50ep"
