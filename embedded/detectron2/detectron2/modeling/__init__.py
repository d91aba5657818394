"""Backbones and post-processing of detections."""

from detectron2.modeling.backbone import (
    Backbone,
    ResNet,
    ResNetBlockBase,
    SwinTransformer,
    make_stage,
)
from detectron2.modeling.postprocessing import detector_postprocess

__all__ = [
    "Backbone",
    "ResNet",
    "ResNetBlockBase",
    "SwinTransformer",
    "detector_postprocess",
    "make_stage",
]
