"""Conditional-DETR that learns the generated shapes in minutes on two CPU cores."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock

from .conditional_detr_r50 import model


def stage(in_channels, out_channels, first_stride):
    return L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=2,
        stride_per_block=[first_stride, 1],
        in_channels=in_channels,
        out_channels=out_channels,
        norm="BN",
    )


# ResNet-18 up to stride 16, narrow, trained from scratch
model.backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=24, norm="BN"),
    stages=[stage(24, 24, 1), stage(24, 48, 2), stage(48, 128, 2)],
    out_features=["res4"],
)
model.in_features = ["res4"]
model.in_channels = 128
model.embed_dim = 128
model.num_queries = 20
model.num_classes = 8
model.select_box_nums_for_evaluation = 100

# boxes are found sooner than classes are learned
model.criterion.weight_dict.loss_class = 4.0

# on a grid of few cells, the usual 10000 leaves most position channels constant
model.position_embedding.update(num_pos_feats=64, temperature=20)
encoder, decoder = model.transformer.encoder, model.transformer.decoder
encoder.layer.attention.update(embed_dim=128, num_heads=8, dropout=0.0)
encoder.layer.update(feedforward_dim=256, ffn_dropout=0.0)
encoder.num_layers = 3
decoder.update(
    embed_dim=128,
    attn_dropout=0.0,
    feedforward_dim=256,
    ffn_dropout=0.0,
    num_layers=3,
    temperature=20,
)
