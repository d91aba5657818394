from .smca_single_scale_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.transformer.decoder.modulation.scales = "single"
train.output_dir = "./output/smca_single_scale_r50_50ep_single"
