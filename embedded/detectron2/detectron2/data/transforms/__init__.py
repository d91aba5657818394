"""Deterministic transforms, most of them fvcore's, and the augmentations that choose them."""

from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    Transform,
    TransformList,
    VFlipTransform,
)

from .augmentation import (
    AugInput,
    Augmentation,
    AugmentationList,
    apply_augmentations,
    apply_transform_gens,
)
from .augmentation_impl import RandomApply, RandomCrop, RandomFlip, Resize, ResizeShortestEdge
from .transform import ResizeTransform

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "CropTransform",
    "HFlipTransform",
    "NoOpTransform",
    "RandomApply",
    "RandomCrop",
    "RandomFlip",
    "Resize",
    "ResizeShortestEdge",
    "ResizeTransform",
    "Transform",
    "TransformList",
    "VFlipTransform",
    "apply_augmentations",
    "apply_transform_gens",
]
