from detectron2.config import LazyCall as L

from projects.detr_distill.query_prior import QueryPriorAssignment

from .common.objectives import d3etr
from .d3etr_conditional_detr_r101_r50_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

model.objectives = [*d3etr("fixed"), L(QueryPriorAssignment)(assignment="last")]
train.output_dir = "./output/d3etr_fixed_conditional_detr_r101_r50_50ep"
