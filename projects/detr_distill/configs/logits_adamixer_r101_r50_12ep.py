from detectron2.config import LazyCall as L

from projects.detr_distill.logits import LogitsDistillation

from .detrdistill_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(LogitsDistillation)()]
train.output_dir = "./output/logits_adamixer_r101_r50_12ep"
