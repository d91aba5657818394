from detrex.config import get_config

from engine.optimizer import backbone_lr_factor

from ....configs.common.data.coco_detr import dataloader
from ....configs.common.train import train
from .models.detr_r50 import model

optimizer = get_config("common/optim.py").AdamW
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_50ep

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/detr_r50_300ep"
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
train.max_iter = 554400

lr_multiplier.scheduler.milestones = [369600, 554400]  # 200 and 300 epochs

optimizer.lr = 1e-4
optimizer.betas = (0.9, 0.999)
optimizer.weight_decay = 1e-4
optimizer.params.lr_factor_func = backbone_lr_factor

dataloader.train.total_batch_size = 64
dataloader.train.num_workers = 16
