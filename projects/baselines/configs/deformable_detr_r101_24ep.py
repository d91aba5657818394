from detrex.config import get_config

from .deformable_detr_r101_50ep import dataloader, model, optimizer, train

lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_24ep

train.output_dir = "./output/deformable_detr_r101_24ep"
train.max_iter = 180000
