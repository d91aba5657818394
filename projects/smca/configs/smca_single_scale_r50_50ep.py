"""Tables 1 to 3 of the paper: SMCA without multi-scale features."""

from ...baselines.configs.detr_r50_50ep import dataloader, lr_multiplier, optimizer, train
from .models.smca_single_scale_r50 import model

train.output_dir = "./output/smca_single_scale_r50_50ep"
