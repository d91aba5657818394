"""AdaMixer on three levels for the generated shapes."""

from .adamixer_r50 import model
from .quickstart import shrink

shrink(model)
model.backbone.out_features = ["res2", "res3", "res4"]
model.neck.update(in_features=["res2", "res3", "res4"], in_channels=[24, 48, 128], out_channels=128)
model.transformer.encoder.embed_dim = 128
model.transformer.decoder.update(
    embed_dim=128, feedforward_dim=256, num_layers=3, strides=[4, 8, 16], out_points=32
)
model.size_divisibility = 16
