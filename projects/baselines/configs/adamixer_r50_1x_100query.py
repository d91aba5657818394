from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detrex.config import get_config
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ....configs.common.data.coco_detr import dataloader
from ....configs.common.train import train
from .models.adamixer_r50 import model

optimizer = get_config("common/optim.py").AdamW
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[60000, 82500, 90000]),
    warmup_length=500 / 90000,
    warmup_method="linear",
    warmup_factor=0.001,
)

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/adamixer_r50_1x_100query"
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
train.max_iter = 90000
train.clip_grad.enabled = True
train.clip_grad.params = {"max_norm": 1.0, "norm_type": 2}

optimizer.lr = 2.5e-5
optimizer.betas = (0.9, 0.999)
optimizer.weight_decay = 1e-4
optimizer.params.weight_decay_norm = None  # that of all other parameters

dataloader.train.num_workers = 16
dataloader.train.mapper.augmentation[-1].short_edge_length = (800,)
dataloader.train.mapper.augmentation_with_crop = None
