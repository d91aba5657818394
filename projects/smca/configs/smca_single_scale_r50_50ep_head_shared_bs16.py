from .smca_single_scale_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.transformer.decoder.modulation.head_shared = True
train.output_dir = "./output/smca_single_scale_r50_50ep_head_shared_bs16"
