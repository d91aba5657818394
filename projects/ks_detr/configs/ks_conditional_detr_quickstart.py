from detectron2.config import LazyCall as L

from projects.ks_detr.encoder import share_knowledge

from ...baselines.configs.conditional_detr_quickstart import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.transformer.encoder = L(share_knowledge)(encoder=model.transformer.encoder)
model.transformer.decoder.mask_padding_in_training = True
train.output_dir = "./output/quickstart"
