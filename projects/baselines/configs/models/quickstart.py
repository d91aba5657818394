"""What the quickstart models have in common, and how a full-size model becomes one of them."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock


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
backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=24, norm="BN"),
    stages=[stage(24, 24, 1), stage(24, 48, 2), stage(48, 128, 2)],
    out_features=["res4"],
)


def shrink(model):
    """Give a model the small backbone, 128 channels, 20 queries, 8 classes."""
    model.backbone = backbone
    model.embed_dim = 128
    model.num_queries = 20
    model.num_classes = 8
    model.select_box_nums_for_evaluation = 100
    # boxes are found sooner than classes are learned
    model.criterion.weight_dict.loss_class = 4.0


def shrink_transformer(model):
    """Three layers each of encoder and decoder, 128 channels, without dropout."""
    # on a grid of few cells, the usual 10000 leaves most position channels constant
    model.position_embedding.update(num_pos_feats=64, temperature=20)
    encoder, decoder = model.transformer.encoder, model.transformer.decoder
    encoder.layer.attention.update(embed_dim=128, dropout=0.0)
    encoder.layer.update(feedforward_dim=256, ffn_dropout=0.0)
    encoder.num_layers = 3
    decoder.update(
        embed_dim=128, attn_dropout=0.0, feedforward_dim=256, ffn_dropout=0.0, num_layers=3
    )


def shrink_to_one_level(model):
    """The map of stride 16 alone."""
    shrink(model)
    shrink_transformer(model)
    model.in_features = ["res4"]
    model.in_channels = 128


def shrink_to_three_levels(model):
    """Strides 8, 16 and, by the neck's own convolution, 32."""
    shrink(model)
    shrink_transformer(model)
    model.backbone.out_features = ["res3", "res4"]
    model.neck.in_features = ["res3", "res4"]
    model.neck.input_shapes = {"res3": ShapeSpec(channels=48), "res4": ShapeSpec(channels=128)}
    model.neck.out_channels = 128
    model.neck.num_outs = 3
    model.neck.norm_layer.update(num_groups=16, num_channels=128)
    model.transformer.num_levels = 3
    model.transformer.encoder.layer.attention.num_levels = 3
    model.transformer.decoder.num_levels = 3
