from .ks_dn_detr_r50_batch4_60ep_share_v import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.transformer.encoder.teacher_features = "mark"
train.output_dir = "./output/ks_dn_detr_r50_batch4_60ep_share_v_mark"
