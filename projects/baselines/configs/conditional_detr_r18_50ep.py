"""ResNet-18 has no file in detectron2's model zoo: name torchvision's."""

from .conditional_detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train
from .models.resnet import small_resnet

model.backbone = small_resnet(18)
model.in_channels = 512
train.init_checkpoint = "path/to/resnet18.pth"
train.output_dir = "./output/conditional_detr_r18_50ep"
