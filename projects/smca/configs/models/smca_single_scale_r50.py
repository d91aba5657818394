"""SMCA on the map of stride 32, with a Gaussian for every head."""

from detectron2.config import LazyCall as L

from projects.smca.attention import Modulation
from projects.smca.decoder import SMCADecoder
from projects.smca.detector import SMCA

from ....baselines.configs.detr_r50_50ep import model

model._target_ = SMCA
decoder = model.transformer.decoder
decoder._target_ = SMCADecoder
decoder.modulation = L(Modulation)(
    embed_dim=256,
    num_heads=8,
    strides=[32],
    level_factors=[1.0],
    scales="independent",
    head_shared=False,
    bandwidth=8.0,
    divide_by_scales=False,
    half_cell_grid=False,
    query_norm=True,
)
