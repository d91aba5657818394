from .smca_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.transformer.encoder.blocks = ["intra"] * 3
train.output_dir = "./output/smca_r50_50ep_3intra"
