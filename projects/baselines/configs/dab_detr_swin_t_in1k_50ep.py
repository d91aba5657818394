from .dab_detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train
from .models.swin_backbones import swin_tiny as _swin

model.backbone = _swin
model.in_features = ["p3"]
model.in_channels = 768
train.init_checkpoint = "path/to/swin_tiny_patch4_window7_224.pth"
train.output_dir = "./output/dab_detr_swin_tiny_in1k_50ep"
