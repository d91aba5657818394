from detectron2.config import LazyCall as L
from detrex.layers import PositionEmbeddingSine
from detrex.modeling import HungarianMatcher
from torch import nn

from detectors.attention import SelfAttention
from detectors.criterion import SetCriterion
from detectors.dab_detr import DABDETR, DABDecoder, DABEncoder, DABTransformer
from detectors.transformer import EncoderLayer

from .resnet import resnet50

model = L(DABDETR)(
    backbone=resnet50,
    in_features=["res5"],
    in_channels=2048,
    embed_dim=256,
    num_queries=300,
    num_classes=80,
    uniform_anchor_centers=True,
    position_embedding=L(PositionEmbeddingSine)(num_pos_feats=128, temperature=20, normalize=True),
    transformer=L(DABTransformer)(
        encoder=L(DABEncoder)(
            layer=L(EncoderLayer)(
                attention=L(SelfAttention)(embed_dim=256, num_heads=8, dropout=0.0),
                feedforward_dim=2048,
                ffn_dropout=0.0,
                activation=L(nn.PReLU)(),
            ),
            num_layers=6,
        ),
        decoder=L(DABDecoder)(
            embed_dim=256,
            num_heads=8,
            attn_dropout=0.0,
            feedforward_dim=2048,
            ffn_dropout=0.0,
            activation=L(nn.PReLU)(),
            num_layers=6,
            modulate_hw_attn=True,
        ),
        num_patterns=0,
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
        weight_dict={"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0},
        loss_class_type="focal_loss",
        alpha=0.25,
        gamma=2.0,
    ),
    aux_loss=True,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    select_box_nums_for_evaluation=300,
)
