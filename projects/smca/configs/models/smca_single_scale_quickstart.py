"""SMCA on the map of stride 16, for the generated shapes."""

from ....baselines.configs.models.quickstart import shrink_to_one_level
from .smca_single_scale_r50 import model

shrink_to_one_level(model)
# on 6 x 6 cells the usual 8 would spread a Gaussian over a third of the image
model.transformer.decoder.modulation.update(embed_dim=128, strides=[16], bandwidth=1.0)
