from .ks_dab_detr_r101_50ep import dataloader, lr_multiplier, model, optimizer, train

model.transformer.encoder.branches = ["share_v"]
train.output_dir = "./output/ks_dab_detr_r101_50ep_share_v"
