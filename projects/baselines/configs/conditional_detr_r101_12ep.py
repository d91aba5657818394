from detrex.config import get_config

from .conditional_detr_r101_50ep import dataloader, model, optimizer, train

lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_12ep

train.output_dir = "./output/conditional_detr_r101_12ep"
train.max_iter = 90000
