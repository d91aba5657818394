"""ResNet-34 has no file in detectron2's model zoo: name torchvision's."""

from .deformable_detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train
from .models.resnet import small_resnet

model.backbone = small_resnet(34)
model.backbone.out_features = ["res3", "res4", "res5"]
for name, channels in {"res3": 128, "res4": 256, "res5": 512}.items():
    model.neck.input_shapes[name].channels = channels
train.init_checkpoint = "path/to/resnet34.pth"
train.output_dir = "./output/deformable_detr_r34_50ep"
