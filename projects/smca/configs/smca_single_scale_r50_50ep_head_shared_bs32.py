from .smca_single_scale_r50_50ep_head_shared_bs16 import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

dataloader.train.total_batch_size = 32
train.max_iter = 187500
train.output_dir = "./output/smca_single_scale_r50_50ep_head_shared_bs32"
