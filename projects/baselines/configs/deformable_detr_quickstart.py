from .conditional_detr_quickstart import dataloader, lr_multiplier, optimizer, train
from .models.deformable_detr_quickstart import model

train.output_dir = "./output/deformable_detr_quickstart"
