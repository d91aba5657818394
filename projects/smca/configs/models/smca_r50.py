"""SMCA on strides 16, 32 and 64: two layers within the levels, one over all, two within."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detrex.modeling.neck import ChannelMapper

from projects.smca.detector import MultiScaleSMCA
from projects.smca.encoder import MultiScaleEncoder

from .smca_single_scale_r50 import model

model._target_ = MultiScaleSMCA
model.backbone.out_features = ["res4", "res5"]
del model.in_features, model.in_channels  # the neck knows
model.neck = L(ChannelMapper)(
    input_shapes={"res4": ShapeSpec(channels=1024), "res5": ShapeSpec(channels=2048)},
    in_features=["res4", "res5"],
    out_channels=256,
    kernel_size=1,
    num_outs=3,
)
model.level_embeddings = True

encoder, decoder = model.transformer.encoder, model.transformer.decoder
encoder._target_ = MultiScaleEncoder
del encoder.num_layers
encoder.layer.feedforward_dim = 1024
encoder.blocks = ["intra", "intra", "multi", "intra", "intra"]
encoder.num_levels = 3
encoder.share = "ffn_and_attention"
decoder.feedforward_dim = 1024
decoder.modulation.strides = [16, 32, 64]
decoder.modulation.level_factors = [0.5, 1.0, 2.0]
decoder.modulation.level_selection = True
