"""Both: one group of the teacher's queries, under the teacher's assignment."""

from .common.objectives import d3etr, detrdistill
from .d3etr_conditional_detr_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [*detrdistill("memory"), *d3etr("adaptive"), *d3etr("fixed")]
train.output_dir = "./output/detrdistill_d3etr_conditional_detr_r101_r50_12ep"
