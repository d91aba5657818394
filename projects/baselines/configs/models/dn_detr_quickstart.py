"""DN-DETR for the generated shapes."""

from .dn_detr_r50 import model
from .quickstart import shrink_to_one_level

shrink_to_one_level(model)
