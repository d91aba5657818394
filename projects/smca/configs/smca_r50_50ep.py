"""Tables 1, 3 and 4 of the paper: SMCA with multi-scale features (2Intra-Multi-2Intra)."""

from ...baselines.configs.detr_r50_50ep import dataloader, lr_multiplier, optimizer, train
from .models.smca_r50 import model

train.output_dir = "./output/smca_r50_50ep"
dataloader.train.total_batch_size = 8
train.max_iter = 750000
