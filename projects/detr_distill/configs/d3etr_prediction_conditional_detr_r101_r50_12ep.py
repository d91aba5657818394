"""One of the three losses, for both groups."""

from .d3etr_conditional_detr_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [model.objectives[index] for index in (2, 5, 6)]
train.output_dir = "./output/d3etr_prediction_conditional_detr_r101_r50_12ep"
