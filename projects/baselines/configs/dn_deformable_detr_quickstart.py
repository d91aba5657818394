from .conditional_detr_quickstart import dataloader, lr_multiplier, optimizer, train
from .models.dn_deformable_detr_quickstart import model

train.output_dir = "./output/dn_deformable_detr_quickstart"
