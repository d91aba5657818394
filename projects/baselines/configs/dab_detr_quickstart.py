from .conditional_detr_quickstart import dataloader, lr_multiplier, optimizer, train
from .models.dab_detr_quickstart import model

train.output_dir = "./output/dab_detr_quickstart"
