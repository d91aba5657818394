from detectors.deformable_detr import MultiLevelTransformer
from detectors.dn_deformable_detr import DNDeformableDecoder, DNDeformableDETR

from .deformable_detr_r50 import model

model._target_ = DNDeformableDETR
del model.with_box_refine, model.as_two_stage  # boxes are always refined, in one stage
model.denoising_groups = 5
model.label_noise_prob = 0.2
model.box_noise_scale = 0.4
model.with_indicator = True

model.transformer._target_ = MultiLevelTransformer
del model.transformer.as_two_stage
encoder, decoder = model.transformer.encoder, model.transformer.decoder
encoder.layer.attention.dropout = 0.0
encoder.layer.update(feedforward_dim=2048, ffn_dropout=0.0)
decoder._target_ = DNDeformableDecoder
decoder.update(feedforward_dim=2048, attn_dropout=0.0, ffn_dropout=0.0)

model.criterion.weight_dict = {
    "loss_class": 1.0,
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_class_dn": 1.0,
    "loss_bbox_dn": 5.0,
    "loss_giou_dn": 2.0,
}
