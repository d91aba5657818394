from .dn_detr_r50 import model
from .resnet_dc5 import resnet50_dc5

model.backbone = resnet50_dc5
