from detrex.config import get_config

from ....configs.common.data.shapes import dataloader
from ....configs.common.schedule import drop_at_three_quarters as lr_multiplier
from ....configs.common.train import train
from .models.conditional_detr_quickstart import model

optimizer = get_config("common/optim.py").AdamW
optimizer.lr = 5e-4
optimizer.weight_decay = 1e-4
optimizer.fused = True

dataloader.evaluator.output_dir = "${train.output_dir}/inference"

train.output_dir = "./output/conditional_detr_quickstart"
train.seed = 0
train.channels_last = True
train.max_iter = 1700
train.clip_grad.enabled = True
train.clip_grad.params = {"max_norm": 0.5, "norm_type": 2}
train.eval_period = 425
train.checkpointer.period = 200
train.log_period = 20
