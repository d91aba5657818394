from detectron2.config import LazyCall as L

from projects.detr_distill.mgd import MGD

from .detrdistill_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(MGD)()]
train.output_dir = "./output/mgd_adamixer_r101_r50_12ep"
