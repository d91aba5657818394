"""Conditional-DETR that learns the generated shapes in minutes on two CPU cores."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock

from .conditional_detr_r50 import model


def stage(num_blocks, in_channels, out_channels, first_stride):
    return L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=num_blocks,
        stride_per_block=[first_stride] + [1] * (num_blocks - 1),
        in_channels=in_channels,
        out_channels=out_channels,
        norm="BN",
    )


model.backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=32, norm="BN"),
    stages=[stage(2, 32, 32, 1), stage(2, 32, 64, 2), stage(2, 64, 128, 2)],
    out_features=["res4"],
)
model.in_features = ["res4"]
model.in_channels = 128
model.embed_dim = 128
model.num_queries = 25
model.num_classes = 10
model.position_embedding.num_pos_feats = 64
model.select_box_nums_for_evaluation = 100

encoder, decoder = model.transformer.encoder, model.transformer.decoder
encoder.layer.attention.update(embed_dim=128, num_heads=8, dropout=0.0)
encoder.layer.update(feedforward_dim=512, ffn_dropout=0.0)
encoder.num_layers = 3
decoder.update(embed_dim=128, attn_dropout=0.0, feedforward_dim=512, ffn_dropout=0.0, num_layers=3)
