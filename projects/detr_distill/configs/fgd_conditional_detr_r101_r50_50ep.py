from detectron2.config import LazyCall as L

from projects.detr_distill.fgd import FGD

from .detrdistill_conditional_detr_r101_r50_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(FGD)(place="memory")]
train.output_dir = "./output/fgd_conditional_detr_r101_r50_50ep"
