"""Student of DETRDistill's Table 4 with 3 encoder and 6 decoder layers."""

from .conditional_detr_r50_12ep import dataloader, lr_multiplier, model, optimizer, train

model.transformer.encoder.num_layers = 3
train.output_dir = "./output/conditional_detr_r50_enc3_dec6_12ep"
