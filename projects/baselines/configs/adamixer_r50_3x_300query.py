from ....configs.common.data.coco_detr import dataloader
from .adamixer_r50_3x_100query import lr_multiplier, model, optimizer, train

lr_multiplier.scheduler.milestones = [180000, 247500, 270000]

model.num_queries = 300
train.output_dir = "./output/adamixer_r50_3x_300query"

dataloader.evaluator.output_dir = "${train.output_dir}/inference"
dataloader.train.num_workers = 16
