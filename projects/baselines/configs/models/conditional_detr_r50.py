from detectron2.config import LazyCall as L
from detrex.layers import PositionEmbeddingSine
from detrex.modeling import HungarianMatcher

from detectors.attention import SelfAttention
from detectors.conditional_detr import ConditionalDecoder, ConditionalDETR
from detectors.criterion import SetCriterion
from detectors.transformer import Encoder, EncoderLayer, Transformer

from .resnet import resnet50

model = L(ConditionalDETR)(
    backbone=resnet50,
    in_features=["res5"],
    in_channels=2048,
    embed_dim=256,
    num_queries=300,
    num_classes=80,
    position_embedding=L(PositionEmbeddingSine)(
        num_pos_feats=128, temperature=10000, normalize=True
    ),
    transformer=L(Transformer)(
        encoder=L(Encoder)(
            layer=L(EncoderLayer)(
                attention=L(SelfAttention)(embed_dim=256, num_heads=8, dropout=0.1),
                feedforward_dim=2048,
                ffn_dropout=0.1,
            ),
            num_layers=6,
        ),
        decoder=L(ConditionalDecoder)(
            embed_dim=256,
            num_heads=8,
            attn_dropout=0.1,
            feedforward_dim=2048,
            ffn_dropout=0.1,
            num_layers=6,
        ),
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
        weight_dict={"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
        loss_class_type="focal_loss",
        alpha=0.25,
        gamma=2.0,
    ),
    aux_loss=True,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    select_box_nums_for_evaluation=300,
)
