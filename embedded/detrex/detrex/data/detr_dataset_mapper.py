"""Mapping of data set records with DETR's choice between two augmentations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data.transforms import Augmentation, Transform

__all__ = ["DetrDatasetMapper"]


class DetrDatasetMapper:
    """A :class:`DatasetMapper` that augments each image in one of two ways, with equal chances."""

    def __init__(
        self,
        augmentation: Sequence[Augmentation | Transform],
        augmentation_with_crop: Sequence[Augmentation | Transform] | None,
        is_train: bool = True,
        mask_on: bool = False,
        img_format: str = "RGB",
    ):
        """Set up the mapper.

        Args:
            augmentation: the first way, the only one if the second is None.
            augmentation_with_crop: the second way, in DETR with a random crop.
            is_train: keep the annotations, as ``instances``.
            mask_on: keep instance masks too; needs the real detectron2.
            img_format: see :func:`detectron2.data.detection_utils.read_image`.
        """
        self.augmentation = augmentation
        self.augmentation_with_crop = augmentation_with_crop
        self.is_train = is_train
        self.mask_on = mask_on
        self.img_format = img_format
        self._mappers = [
            DatasetMapper(
                is_train,
                augmentations=augmentations,
                image_format=img_format,
                use_instance_mask=mask_on,
            )
            for augmentations in (augmentation, augmentation_with_crop)
            if augmentations is not None
        ]

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a new dict with "image", uint8 of shape (C, H, W), and "instances" in training."""
        first = len(self._mappers) == 1 or np.random.rand() > 0.5
        return self._mappers[0 if first else 1](dataset_dict)
