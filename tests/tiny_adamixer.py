"""A tiny AdaMixer for tests."""

import torch
from detrex.modeling import HungarianMatcher
from tiny_detectors import instances, pattern_image
from torch import nn

from detectors.adamixer import (
    AdaMixer,
    AdaMixerDecoder,
    ChannelMapping,
    CornerCriterion,
    NoEncoder,
)
from detectors.adamixer_layer import Pyramid
from detectors.transformer import Transformer

STRIDES = (4, 8, 16, 32)
SINGLE = {"rtol": 1e-5, "atol": 1e-6}
"""For what was recorded, or is computed by the criterion, in float32."""


class FourLevelBackbone(nn.Module):
    """Average pooling by 4, 8, 16 and 32 that keeps padded cells exactly zero."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        features = {}
        for level, stride in enumerate(STRIDES):
            pooled = nn.functional.avg_pool2d(
                images, stride, ceil_mode=True, count_include_pad=False
            )
            pooled = torch.cat([pooled, pooled**2, pooled**3], dim=1)
            features[f"res{level + 2}"] = pooled[:, : 4 + level]
        return features


def build_adamixer(num_queries=6, num_classes=5, in_points=6, num_layers=2, **options):
    """A tiny AdaMixer of the recorded sizes."""
    torch.manual_seed(0)
    decoder = AdaMixerDecoder(32, 4, 48, num_layers, STRIDES, 2, in_points, 8)
    model = AdaMixer(
        backbone=FourLevelBackbone(),
        neck=ChannelMapping(["res2", "res3", "res4", "res5"], [4, 5, 6, 7], 32, num_groups=8),
        embed_dim=32,
        num_queries=num_queries,
        num_classes=num_classes,
        transformer=Transformer(NoEncoder(32), decoder),
        criterion=CornerCriterion(
            num_classes=num_classes,
            matcher=HungarianMatcher(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
            weight_dict={"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
            loss_class_type="focal_loss",
            alpha=0.25,
            gamma=2.0,
        ),
        select_box_nums_for_evaluation=10,
        size_divisibility=32,
        **options,
    )
    for head in model.bbox_embed:
        nn.init.normal_(head[-1].weight, std=0.1)
    for mixer in model.transformer.decoder.layers:
        nn.init.normal_(mixer.mixing.parameter_generator.weight, std=0.05)
    return model


def batch(boxes=((4, 4, 60, 60), (30, 20, 120, 90))):
    """Two images of different sizes, the second one without boxes."""
    sizes = [(96, 128), (64, 80)]
    return [
        {
            "image": pattern_image(0, *sizes[0]),
            "instances": instances(sizes[0], list(boxes), [1] * len(boxes)),
        },
        {"image": pattern_image(1, *sizes[1]), "instances": instances(sizes[1], [], [])},
    ]


def pyramid(features):
    """Maps (B, C, H, W) as the decoder sees them."""
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in features], dim=1)
    shapes = tuple(tuple(level.shape[-2:]) for level in features)
    return Pyramid(tokens, shapes, STRIDES, tokens.dtype)
