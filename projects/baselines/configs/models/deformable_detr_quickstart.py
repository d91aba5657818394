"""Deformable DETR on three levels for the generated shapes."""

from .deformable_detr_r50 import model
from .quickstart import shrink_to_three_levels

shrink_to_three_levels(model)
