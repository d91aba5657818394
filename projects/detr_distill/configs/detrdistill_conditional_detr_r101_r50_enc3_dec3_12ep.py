from ...baselines.configs.conditional_detr_r50_enc3_dec3_12ep import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ...baselines.configs.conditional_detr_r50_enc3_dec3_12ep import model as _student
from ...baselines.configs.conditional_detr_r101_12ep import model as _teacher
from .common.distill import distill, teacher
from .common.objectives import detrdistill

model = distill(_student, _teacher, detrdistill("memory"))
train.output_dir = "./output/detrdistill_conditional_detr_r101_r50_enc3_dec3_12ep"
