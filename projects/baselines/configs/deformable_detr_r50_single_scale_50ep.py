from .deformable_detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.out_features = model.neck.in_features = ["res5"]
model.neck.num_outs = 1
transformer = model.transformer
for part in (transformer, transformer.encoder.layer.attention, transformer.decoder):
    part.num_levels = 1

train.output_dir = "./output/deformable_detr_r50_single_scale_50ep"
