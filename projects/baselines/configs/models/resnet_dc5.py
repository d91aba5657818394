"""ResNet with torchvision's names whose last stage is dilated: stride 16 instead of 32 (DC5)."""

from detectron2.config import LazyCall as L
from detrex.modeling.backbone.torchvision_resnet import TorchvisionResNet

resnet50_dc5 = L(TorchvisionResNet)(
    name="resnet50",
    train_backbone=True,
    dilation=True,
    return_layers={"layer4": "res5"},
)
