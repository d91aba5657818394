from detrex.config import get_config

from engine.optimizer import backbone_lr_factor

from ....configs.common.data.coco_detr import dataloader
from ....configs.common.train import train
from .models.dn_detr_r50 import model

optimizer = get_config("common/optim.py").AdamW
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_50ep

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/dn_detr_r50_50ep"
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
train.max_iter = 375000
train.clip_grad.enabled = True
train.clip_grad.params = {"max_norm": 0.1, "norm_type": 2}

optimizer.lr = 1e-4
optimizer.betas = (0.9, 0.999)
optimizer.weight_decay = 1e-4
optimizer.params.lr_factor_func = backbone_lr_factor

dataloader.train.num_workers = 16
