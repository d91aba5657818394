from .ks_dn_detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.total_batch_size = 4
train.max_iter = 60 * 30000  # the schedule is in fractions of it: the drop is after 48 epochs
train.output_dir = "./output/ks_dn_detr_r50_batch4_60ep"
