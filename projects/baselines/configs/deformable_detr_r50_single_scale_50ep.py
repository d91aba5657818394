from .deformable_detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.out_features = model.neck.in_features = ["res5"]
model.neck.num_outs = 1
_transformer = model.transformer
for _part in (_transformer, _transformer.encoder.layer.attention, _transformer.decoder):
    _part.num_levels = 1

train.output_dir = "./output/deformable_detr_r50_single_scale_50ep"
