from ...baselines.configs.conditional_detr_quickstart import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from .models.smca_single_scale_quickstart import model

train.output_dir = "./output/smca_single_scale_quickstart"
