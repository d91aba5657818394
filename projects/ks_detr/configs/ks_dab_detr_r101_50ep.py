from detectron2.config import LazyCall as L

from projects.ks_detr.encoder import share_knowledge

from ...baselines.configs.dab_detr_r101_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.transformer.encoder = L(share_knowledge)(encoder=model.transformer.encoder)
model.transformer.decoder.mask_padding_in_training = True
model.transformer.decoder.checkpoint_layers = "wide"  # for three branches
train.output_dir = "./output/ks_dab_detr_r101_50ep"
