"""ResNet-34 has no file in detectron2's model zoo: name torchvision's."""

from .conditional_detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train
from .models.resnet import small_resnet

model.backbone = small_resnet(34)
model.in_channels = 512
train.init_checkpoint = "path/to/resnet34.pth"
train.output_dir = "./output/conditional_detr_r34_50ep"
