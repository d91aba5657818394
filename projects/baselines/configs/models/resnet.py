"""ResNet-50 with frozen norms, as most detectors start from it."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

resnet50 = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
    out_features=["res2", "res3", "res4", "res5"],
    freeze_at=1,
)


def small_resnet(depth):
    """ResNet-18 or 34, whose stages have a quarter of ResNet-50's channels, as torchvision's."""
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=depth, norm="FrozenBN"),
        out_features=["res2", "res3", "res4", "res5"],
        freeze_at=1,
    )
