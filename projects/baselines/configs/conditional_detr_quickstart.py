from detrex.config import get_config

from ....configs.common.data.shapes import dataloader
from ....configs.common.schedule import drop_at_three_quarters as lr_multiplier
from ....configs.common.train import train
from .models.conditional_detr_quickstart import model

optimizer = get_config("common/optim.py").AdamW
optimizer.lr = 3e-4
optimizer.weight_decay = 1e-4

train.output_dir = "./output/conditional_detr_quickstart"
dataloader.evaluator.output_dir = "${train.output_dir}"
train.max_iter = 2400
train.clip_grad.enabled = True
train.clip_grad.params = {"max_norm": 0.5, "norm_type": 2}
train.eval_period = 600
train.checkpointer.period = 300
train.log_period = 20
