"""A student that shares knowledge in its encoder learns from a plain teacher."""

from detectron2.config import LazyCall as L

from projects.ks_detr.encoder import share_knowledge

from .detrdistill_conditional_detr_r101_r50_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    teacher,
    train,
)

_encoder = model.student.transformer.encoder
model.student.transformer.encoder = L(share_knowledge)(encoder=_encoder)
model.student.transformer.decoder.mask_padding_in_training = True
train.output_dir = "./output/detrdistill_ks_conditional_detr_r101_r50_50ep"
