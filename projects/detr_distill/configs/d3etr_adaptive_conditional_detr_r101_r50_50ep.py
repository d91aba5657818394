from .common.objectives import d3etr
from .d3etr_conditional_detr_r101_r50_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = d3etr("adaptive")
train.output_dir = "./output/d3etr_adaptive_conditional_detr_r101_r50_50ep"
