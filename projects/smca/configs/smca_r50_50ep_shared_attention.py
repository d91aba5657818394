from .smca_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.transformer.encoder.share = "attention"
train.output_dir = "./output/smca_r50_50ep_shared_attention"
