from .conditional_detr_quickstart import dataloader, lr_multiplier, optimizer, train
from .models.adamixer_quickstart import model

train.output_dir = "./output/adamixer_quickstart"
