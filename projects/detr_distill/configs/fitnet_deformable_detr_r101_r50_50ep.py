from detectron2.config import LazyCall as L

from projects.detr_distill.fitnet import FitNet

from .detrdistill_deformable_detr_r101_r50_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(FitNet)()]
train.output_dir = "./output/fitnet_deformable_detr_r101_r50_50ep"
