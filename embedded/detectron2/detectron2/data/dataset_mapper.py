"""detectron2's standard step from a record of a data set to the input of a detector."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fvcore.transforms.transform import Transform

from detectron2.structures import BoxMode, Instances

from . import detection_utils as utils
from . import transforms as T

__all__ = ["DatasetMapper"]


class DatasetMapper:
    """Reads an image, augments it with its boxes, and turns both into tensors."""

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | Transform],
        image_format: str,
        use_instance_mask: bool = False,
        use_keypoint: bool = False,
        instance_mask_format: str = "polygon",
        keypoint_hflip_indices: np.ndarray | None = None,
        precomputed_proposal_topk: int | None = None,
        recompute_boxes: bool = False,
    ):
        """Set up the mapper for boxes only.

        Args:
            is_train: keep the annotations, as ``instances``.
            augmentations: applied in this order.
            image_format: see :func:`detection_utils.read_image`.
            use_instance_mask: must stay False, like the other options about masks, keypoints and
                proposals.
            use_keypoint: see ``use_instance_mask``.
            instance_mask_format: unused.
            keypoint_hflip_indices: unused.
            precomputed_proposal_topk: see ``use_instance_mask``.
            recompute_boxes: see ``use_instance_mask``.
        """
        if use_instance_mask or use_keypoint or recompute_boxes or precomputed_proposal_topk:
            raise NotImplementedError(
                "masks, keypoints and proposals need the real detectron2; "
                "its subset here handles boxes"
            )
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info("Augmentations in %s: %s", mode, augmentations)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a new dict with "image", uint8 of shape (C, H, W), and "instances" in training."""
        record = dict(dataset_dict)
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(record, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        # a copy: torch takes no negative strides, as a flipped image of one pixel keeps them
        record["image"] = torch.as_tensor(image.transpose(2, 0, 1).copy())
        annotations = record.pop("annotations", None)
        if self.is_train and annotations is not None:
            record["instances"] = _instances(annotations, transforms, image.shape[:2])
        return record


def _instances(
    annotations: list[dict], transforms: T.TransformList, image_size: tuple[int, int]
) -> Instances:
    """Transform annotations; drop those of crowds and those left empty."""
    kept = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
    boxes = utils._transform_boxes(kept, transforms, image_size)
    transformed = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": annotation["category_id"]}
        for box, annotation in zip(boxes, kept, strict=True)
    ]
    instances = utils.annotations_to_instances(transformed, image_size)
    return utils.filter_empty_instances(instances)  # type: ignore[return-value]
