from .common.objectives import mixed_matching
from .detrdistill_conditional_detr_quickstart import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = mixed_matching()
train.output_dir = "./output/d3etr_conditional_detr_quickstart"
