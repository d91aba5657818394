from .smca_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/smca_r50_108ep"
train.max_iter = 108 * 15000
lr_multiplier.scheduler.milestones = [80, 108]  # epochs; the paper does not say when it drops
