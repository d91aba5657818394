from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detrex.layers import PositionEmbeddingSine
from detrex.modeling import HungarianMatcher
from detrex.modeling.neck import ChannelMapper
from torch import nn

from detectors.criterion import SetCriterion
from detectors.deformable_attention import DeformableSelfAttention
from detectors.deformable_detr import (
    DeformableDecoder,
    DeformableDETR,
    DeformableTransformer,
)
from detectors.transformer import Encoder, EncoderLayer

from .resnet import resnet50

model = L(DeformableDETR)(
    backbone=resnet50,
    neck=L(ChannelMapper)(
        input_shapes={
            "res3": ShapeSpec(channels=512),
            "res4": ShapeSpec(channels=1024),
            "res5": ShapeSpec(channels=2048),
        },
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        num_outs=4,
        kernel_size=1,
        norm_layer=L(nn.GroupNorm)(num_groups=32, num_channels=256),
    ),
    embed_dim=256,
    num_queries=300,
    num_classes=80,
    with_box_refine=False,
    as_two_stage=False,
    position_embedding=L(PositionEmbeddingSine)(
        num_pos_feats=128, temperature=10000, normalize=True, offset=-0.5
    ),
    transformer=L(DeformableTransformer)(
        encoder=L(Encoder)(
            layer=L(EncoderLayer)(
                attention=L(DeformableSelfAttention)(
                    embed_dim=256, num_heads=8, num_levels=4, num_points=4, dropout=0.1
                ),
                feedforward_dim=1024,
                ffn_dropout=0.1,
            ),
            num_layers=6,
        ),
        decoder=L(DeformableDecoder)(
            embed_dim=256,
            num_heads=8,
            attn_dropout=0.1,
            feedforward_dim=1024,
            ffn_dropout=0.1,
            num_layers=6,
            num_levels=4,
            num_points=4,
        ),
        num_levels=4,
        as_two_stage="${..as_two_stage}",
    ),
    criterion=L(SetCriterion)(
        num_classes="${..num_classes}",
        matcher=L(HungarianMatcher)(
            cost_class=2.0,
            cost_bbox=5.0,
            cost_giou=2.0,
            cost_class_type="focal_loss_cost",
            alpha=0.25,
            gamma=2.0,
        ),
        weight_dict={
            "loss_class": 1.0,
            "loss_bbox": 5.0,
            "loss_giou": 2.0,
            "loss_class_enc": 1.0,
            "loss_bbox_enc": 5.0,
            "loss_giou_enc": 2.0,
        },
        loss_class_type="focal_loss",
        alpha=0.25,
        gamma=2.0,
    ),
    aux_loss=True,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    select_box_nums_for_evaluation=300,
)
model.backbone.out_features = ["res3", "res4", "res5"]
