"""Layers of DETR-like detectors."""

from detrex.layers.attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    MultiheadAttention,
)
from detrex.layers.box_ops import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    masks_to_boxes,
)
from detrex.layers.conv import ConvNorm, ConvNormAct
from detrex.layers.layer_norm import LayerNorm
from detrex.layers.mlp import FFN, MLP
from detrex.layers.position_embedding import (
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    get_sine_pos_embed,
)
from detrex.layers.shape_spec import ShapeSpec
from detrex.layers.transformer import BaseTransformerLayer, TransformerLayerSequence

__all__ = [
    "FFN",
    "MLP",
    "BaseTransformerLayer",
    "ConditionalCrossAttention",
    "ConditionalSelfAttention",
    "ConvNorm",
    "ConvNormAct",
    "LayerNorm",
    "MultiheadAttention",
    "PositionEmbeddingLearned",
    "PositionEmbeddingSine",
    "ShapeSpec",
    "TransformerLayerSequence",
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "generalized_box_iou",
    "get_sine_pos_embed",
    "masks_to_boxes",
]
