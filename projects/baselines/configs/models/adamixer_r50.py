from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detrex.modeling import HungarianMatcher

from detectors.adamixer import (
    AdaMixer,
    AdaMixerDecoder,
    ChannelMapping,
    CornerCriterion,
    NoEncoder,
)
from detectors.transformer import Transformer

model = L(AdaMixer)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="BN"),
        out_features=["res2", "res3", "res4", "res5"],
        freeze_at=2,
    ),
    neck=L(ChannelMapping)(
        in_features=["res2", "res3", "res4", "res5"],
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        num_groups=32,
    ),
    embed_dim=256,
    num_queries=100,
    num_classes=80,
    transformer=L(Transformer)(
        encoder=L(NoEncoder)(embed_dim=256),
        decoder=L(AdaMixerDecoder)(
            embed_dim=256,
            num_heads=8,
            feedforward_dim=2048,
            num_layers=6,
            strides=[4, 8, 16, 32],
            num_groups=4,
            in_points=32,
            out_points=128,
        ),
    ),
    criterion=L(CornerCriterion)(
        num_classes="${..num_classes}",
        matcher=L(HungarianMatcher)(
            cost_class=2.0,
            cost_bbox=5.0,
            cost_giou=2.0,
            cost_class_type="focal_loss_cost",
            alpha=0.25,
            gamma=2.0,
        ),
        weight_dict={"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
        loss_class_type="focal_loss",
        alpha=0.25,
        gamma=2.0,
    ),
    aux_loss=True,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    select_box_nums_for_evaluation="${.num_queries}",
    size_divisibility=32,
)
