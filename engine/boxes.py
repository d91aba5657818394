"""Annotations that cannot be trained on."""

import logging
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

__all__ = ["drop_bad_boxes", "float_boxes", "is_box"]

logger = logging.getLogger(__name__)


def drop_bad_boxes(dataset: list[dict]) -> list[dict]:
    """Return the dataset dicts without unusable boxes and log how many were dropped.

    Dropped are boxes of non-positive width or height and boxes wholly outside their image, the same
    that detectron2's mapper drops after its transforms. Images stay, even when left without a box.

    Raises:
        ValueError: an annotation's bbox is missing or not of four numbers; names the image.
    """
    empty = outside = 0
    result = []
    for record in dataset:
        kept = []
        for annotation in record.get("annotations", []):
            fault = _fault(annotation, record)
            empty += fault == "empty"
            outside += fault == "outside"
            if fault is None:
                kept.append(annotation)
        changed = len(kept) != len(record.get("annotations", []))
        result.append({**record, "annotations": kept} if changed else record)
    if empty or outside:
        logger.warning(
            "dropped %d boxes of non-positive size and %d outside their image", empty, outside
        )
    return result


def float_boxes(record: dict) -> dict:
    """Return a dataset dict whose boxes are floats: the record itself if they already are.

    A COCO file may state them in integers, in which detectron2's mapper would also transform them.
    """
    annotations = record.get("annotations", [])
    changed = [_with_float_box(annotation) for annotation in annotations]
    if all(new is old for new, old in zip(changed, annotations, strict=True)):
        return record
    return {**record, "annotations": changed}


def _with_float_box(annotation: dict) -> dict:
    box = annotation.get("bbox")
    if type(box) is list and all(type(number) is float for number in box):  # nearly all are
        return annotation
    if box is None or not is_box(box) or all(isinstance(number, float) for number in box):
        return annotation
    return {**annotation, "bbox": [float(number) for number in box]}


def is_box(bbox: Any) -> bool:
    """Whether an annotation's box is of four numbers."""
    if not isinstance(bbox, Sequence | np.ndarray) or len(bbox) != 4:
        return False
    return all(isinstance(number, Real) for number in bbox)


def _fault(annotation: dict, record: dict) -> str | None:
    bbox = annotation.get("bbox")
    if bbox is None and annotation.get("iscrowd"):
        return None  # which is not trained on
    if bbox is None or not is_box(bbox):
        raise ValueError(f"{record.get('file_name')}: a bbox is {bbox!r}, expected 4 numbers")
    mode = annotation.get("bbox_mode", BoxMode.XYWH_ABS)
    x0, y0, x1, y1 = BoxMode.convert(list(bbox), mode, BoxMode.XYXY_ABS)
    if not (x1 > x0 and y1 > y0):
        return "empty"
    if "width" not in record or "height" not in record:
        return None
    inside = x1 > 0 and y1 > 0 and x0 < record["width"] and y0 < record["height"]
    return None if inside else "outside"
