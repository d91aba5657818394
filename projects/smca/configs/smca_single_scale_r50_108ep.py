from .smca_single_scale_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/smca_single_scale_r50_108ep"
train.max_iter = 108 * 7500
lr_multiplier.scheduler.milestones = [80, 108]  # epochs; the paper does not say when it drops
