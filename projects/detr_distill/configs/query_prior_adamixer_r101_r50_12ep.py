from detectron2.config import LazyCall as L

from projects.detr_distill.query_prior import QueryPriorAssignment

from .detrdistill_adamixer_r101_r50_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [L(QueryPriorAssignment)()]
train.output_dir = "./output/query_prior_adamixer_r101_r50_12ep"
