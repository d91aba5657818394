from .smca_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.transformer.decoder.modulation.level_selection = False
train.output_dir = "./output/smca_r50_50ep_without_selection"
