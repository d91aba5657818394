from .conditional_detr_r50_50ep import dataloader, lr_multiplier, optimizer, train
from .models.deformable_detr_r50 import model

train.output_dir = "./output/deformable_detr_r50_50ep"
