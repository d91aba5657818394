from detectron2.config import LazyCall as L

from projects.detr_distill.fgd import FGD

from .detrdistill_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(FGD)()]
train.output_dir = "./output/fgd_adamixer_r101_r50_12ep"
