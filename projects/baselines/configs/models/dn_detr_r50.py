from detectors.dn_detr import DNDETR
from detectors.transformer import Transformer

from .dab_detr_r50 import model

model._target_ = DNDETR
model.uniform_anchor_centers = False
model.denoising_groups = 5
model.label_noise_prob = 0.2
model.box_noise_scale = 0.4
model.with_indicator = True

model.transformer._target_ = Transformer
del model.transformer.num_patterns

model.criterion.weight_dict.update(loss_class_dn=1.0, loss_bbox_dn=5.0, loss_giou_dn=2.0)
