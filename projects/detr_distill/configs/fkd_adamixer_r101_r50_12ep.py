from detectron2.config import LazyCall as L

from projects.detr_distill.fkd import FKD

from .detrdistill_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(FKD)()]
train.output_dir = "./output/fkd_adamixer_r101_r50_12ep"
