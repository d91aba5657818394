"""SMCA on strides 8, 16 and 32, for the generated shapes."""

from detectron2.layers import ShapeSpec

from ....baselines.configs.models.quickstart import shrink, shrink_transformer
from .smca_r50 import model

shrink(model)
shrink_transformer(model)
model.backbone.out_features = ["res3", "res4"]
model.neck.update(
    input_shapes={"res3": ShapeSpec(channels=48), "res4": ShapeSpec(channels=128)},
    in_features=["res3", "res4"],
    out_channels=128,
)
encoder, decoder = model.transformer.encoder, model.transformer.decoder
del encoder.num_layers
encoder.blocks = ["intra", "multi", "intra"]
# the usual 8 would spread a Gaussian over a third of these small images
decoder.modulation.update(embed_dim=128, strides=[8, 16, 32], bandwidth=1.0)
