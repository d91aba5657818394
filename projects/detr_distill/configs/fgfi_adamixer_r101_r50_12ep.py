from detectron2.config import LazyCall as L

from projects.detr_distill.fgfi import FGFI

from .detrdistill_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(FGFI)()]
train.output_dir = "./output/fgfi_adamixer_r101_r50_12ep"
