from ....configs.common.data.coco_detr import dataloader
from .adamixer_r50_1x_100query import lr_multiplier, model, optimizer, train

lr_multiplier.scheduler.milestones = [202500, 247500, 270000]
lr_multiplier.warmup_length = 500 / 270000

train.output_dir = "./output/adamixer_r50_3x_100query"
train.max_iter = 270000

dataloader.evaluator.output_dir = "${train.output_dir}/inference"
dataloader.train.num_workers = 16
dataloader.train.mapper.augmentation_with_crop = None
