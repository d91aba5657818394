"""Tiny detectors for tests: stub backbones, recorded weights, inputs."""

import zlib
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from detrex.layers import PositionEmbeddingSine
from detrex.modeling import HungarianMatcher
from torch import nn

from detectors.attention import SelfAttention
from detectors.conditional_detr import ConditionalDecoder, ConditionalDETR
from detectors.criterion import SetCriterion
from detectors.transformer import Encoder, EncoderLayer, Transformer

ROOT = Path(__file__).resolve().parent.parent


SETTINGS = {
    "embed_dim": 32,
    "num_heads": 4,
    "feedforward_dim": 48,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_classes": 5,
    "num_queries": 6,
    "c5": 8,
    "select_box_nums_for_evaluation": 10,
}


class StubBackbone(nn.Module):
    """Ignores the image and returns recorded feature maps."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return {name: value.to(images.dtype) for name, value in self.features.items()}


class StridedBackbone(nn.Module):
    """Average pooling by 16 that keeps padded cells exactly zero."""

    def forward(self, images):
        pooled = torch.nn.functional.avg_pool2d(images, 16, ceil_mode=True, count_include_pad=False)
        return {"res5": torch.cat([pooled, pooled**2, pooled[:, :2]], dim=1)}


def build_single_scale(kind, decoder, criterion, settings, features, **options):
    """A detector of the given kind and settings on recorded features."""
    dim, heads = settings["embed_dim"], settings["num_heads"]
    transformer = Transformer(
        Encoder(
            EncoderLayer(SelfAttention(dim, heads), settings["feedforward_dim"], ffn_dropout=0.0),
            settings["num_encoder_layers"],
        ),
        decoder(
            dim,
            heads,
            attn_dropout=0.0,
            feedforward_dim=settings["feedforward_dim"],
            ffn_dropout=0.0,
            num_layers=settings["num_decoder_layers"],
        ),
    )
    return kind(
        backbone=StubBackbone(features),
        in_features=["res5"],
        in_channels=settings["c5"],
        embed_dim=dim,
        num_queries=settings["num_queries"],
        num_classes=settings["num_classes"],
        position_embedding=PositionEmbeddingSine(dim // 2, normalize=True),
        transformer=transformer,
        criterion=criterion,
        select_box_nums_for_evaluation=settings["select_box_nums_for_evaluation"],
        **options,
    )


def focal_criterion(settings):
    """The criterion of detectors that score every class by itself."""
    return SetCriterion(
        num_classes=settings["num_classes"],
        matcher=HungarianMatcher(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
        weight_dict={"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
        loss_class_type="focal_loss",
        alpha=0.25,
        gamma=2.0,
    )


def cross_entropy_criterion(settings):
    """The criterion of detectors that have a background class."""
    return SetCriterion(
        num_classes=settings["num_classes"],
        matcher=HungarianMatcher(1.0, 5.0, 2.0, cost_class_type="ce_cost"),
        weight_dict={"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0},
        loss_class_type="ce_loss",
        eos_coef=0.1,
    )


def build_conditional(settings, features, **options):
    """A Conditional-DETR of the given settings on recorded features."""
    criterion = focal_criterion(settings)
    return build_single_scale(
        ConditionalDETR, ConditionalDecoder, criterion, settings, features, **options
    )


def recipe_weights(parameters, seed):
    """The weights that the recorded detectors were built with, from their keys alone."""
    weights = {}
    for key, entry in parameters.items():
        rng = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
        value = entry["mean"] + entry["std"] * rng.standard_normal(entry["shape"])
        weights[key] = torch.from_numpy(np.float32(np.round(value * 1024) / 1024))
    return weights


def pattern_image(index, height, width):
    """The image whose pixels follow the recorded formula."""
    c, y, x = np.ogrid[:3, :height, :width]
    return torch.from_numpy(((37 * c + 3 * y + 5 * x + 11 * index) % 256).astype(np.float32))


def instances(size, boxes, classes):
    """Ground truth of one image of ``size`` (h, w) from xyxy boxes in pixels."""
    result = Instances(tuple(size))
    result.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return result
