from detectron2.config import LazyCall as L

from projects.detr_distill.fitnet import FitNet

from .detrdistill_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(FitNet)()]
train.output_dir = "./output/fitnet_adamixer_r101_r50_12ep"
