from .conditional_detr_quickstart import dataloader, lr_multiplier, optimizer, train
from .models.detr_quickstart import model

train.output_dir = "./output/detr_quickstart"
