from .conditional_detr_r50_50ep import dataloader, lr_multiplier, optimizer, train
from .models.dab_detr_r50 import model

train.output_dir = "./output/dab_detr_r50_50ep"
