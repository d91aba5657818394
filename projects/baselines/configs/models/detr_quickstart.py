"""DETR, with focal loss as in SMCA's baseline, for the generated shapes."""

from .conditional_detr_r50 import model as conditional
from .detr_r50 import model
from .quickstart import shrink_to_one_level

model.criterion = conditional.criterion
shrink_to_one_level(model)
