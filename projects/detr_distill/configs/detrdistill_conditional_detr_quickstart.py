"""Half the quickstart's iterations under a teacher that had all of them."""

from ...baselines.configs.conditional_detr_quickstart import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ...baselines.configs.conditional_detr_quickstart import model as _student
from ...baselines.configs.models.conditional_detr_quickstart import model as _teacher
from .common.distill import distill, teacher
from .common.objectives import detrdistill

model = distill(_student, _teacher, detrdistill("memory"))
train.max_iter = 850
train.output_dir = "./output/detrdistill_conditional_detr_quickstart"
