"""Steps that dataset mappers are made of: reading images, transforming annotations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fvcore.transforms.transform import Transform, TransformList
from PIL import ExifTags, Image

from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager

from .catalog import MetadataCatalog

__all__ = [
    "SizeMismatchError",
    "annotations_to_instances",
    "check_image_size",
    "check_metadata_consistency",
    "convert_image_to_rgb",
    "filter_empty_instances",
    "read_image",
    "transform_instance_annotations",
]

_UPRIGHT = 1
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SizeMismatchError(ValueError):
    """An image does not have the size that its annotations state."""


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image, turned upright if its EXIF data says how.

    Args:
        file_name: path of the image.
        format: a mode of Pillow such as "RGB" or "L", or "BGR"; None keeps the file's own.

    Returns:
        uint8 array of shape (H, W, C), with C = 1 for "L".

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: or what else Pillow raises, if the file cannot be decoded; names the file.
    """
    with PathManager.open(file_name, "rb") as file:
        try:
            image = _upright(Image.open(file))
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            # Of a damaged file, Pillow says what is wrong with it but not which one it is.
            raise type(error)(f"cannot decode image {file_name}: {error}") from error
        pixels = np.asarray(image if format is None else image.convert(_pillow_mode(format)))
    if format == "L":
        return pixels[..., None]
    return pixels[..., ::-1] if format == "BGR" else pixels


def _pillow_mode(format: str) -> str:
    return "RGB" if format == "BGR" else format


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # damaged EXIF data raises all kinds of errors, the pixels may still be fine
        return image
    method = _ORIENTATIONS.get(orientation)
    return image if method is None else image.transpose(method)


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """Convert an image of shape (H, W, C) from ``format``, see :func:`read_image`, to RGB."""
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    if format == "BGR":
        return image[..., ::-1]
    height, width = image.shape[:2]
    picture = Image.frombytes(format, (width, height), image.astype(np.uint8).tobytes())
    return np.asarray(picture.convert("RGB"))


def check_image_size(dataset_dict: dict, image: np.ndarray) -> None:
    """Compare the record's "width" and "height" with the image's, or add them if absent.

    Raises:
        SizeMismatchError: if they differ.
    """
    height, width = image.shape[:2]
    stated = (dataset_dict.setdefault("width", width), dataset_dict.setdefault("height", height))
    if stated != (width, height):
        raise SizeMismatchError(
            f"image {dataset_dict.get('file_name', '')} has (width, height) {(width, height)}, "
            f"its annotations state {stated}"
        )


def transform_instance_annotations(
    annotation: dict,
    transforms: TransformList | Sequence[Transform],
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: np.ndarray | None = None,
) -> dict:
    """Transform the box of one annotation, in place, and clip it to the image.

    Args:
        annotation: with "bbox" and "bbox_mode"; afterwards in the mode XYXY_ABS.
        transforms: to apply.
        image_size: (height, width) of the transformed image.
        keypoint_hflip_indices: unused, keypoints are not supported.

    Returns:
        The same dict.

    Raises:
        NotImplementedError: if the annotation has a segmentation or keypoints.
    """
    _refuse_masks_and_keypoints(annotation)
    annotation["bbox"] = _transform_boxes([annotation], transforms, image_size)[0]
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    return annotation


def _transform_boxes(
    annotations: Sequence[dict],
    transforms: TransformList | Sequence[Transform],
    image_size: tuple[int, int],
) -> np.ndarray:
    """Transform the boxes of annotations and clip them to the image.

    Args:
        annotations: with "bbox" and "bbox_mode".
        transforms: to apply.
        image_size: (height, width) of the transformed image.

    Returns:
        xyxy boxes of shape (N, 4).
    """
    if not annotations:
        return np.zeros((0, 4))
    if not isinstance(transforms, Transform):
        transforms = TransformList(transforms)
    height, width = image_size
    corners = [width, height, width, height]
    return np.clip(transforms.apply_box(_corners_of(annotations)), 0, corners)


def _corners_of(annotations: Sequence[dict]) -> np.ndarray:
    modes = {annotation["bbox_mode"] for annotation in annotations}
    boxes = [annotation["bbox"] for annotation in annotations]
    if len(modes) > 1:
        return np.concatenate([_corners_of([annotation]) for annotation in annotations])
    mode = modes.pop()
    if mode == BoxMode.XYXY_ABS:
        return np.array(boxes, dtype=float)
    numbers = torch.tensor(boxes, dtype=torch.float32)  # as in the conversion of a single box
    return BoxMode.convert(numbers, mode, BoxMode.XYXY_ABS).double().numpy()


def annotations_to_instances(
    annos: Sequence[dict], image_size: tuple[int, int], mask_format: str = "polygon"
) -> Instances:
    """Collect annotations in Instances with the fields ``gt_boxes`` and ``gt_classes``.

    Args:
        annos: with "bbox", "bbox_mode" and "category_id".
        image_size: (height, width).
        mask_format: unused, masks are not supported.

    Raises:
        NotImplementedError: if an annotation has a segmentation or keypoints.
    """
    for annotation in annos:
        _refuse_masks_and_keypoints(annotation)
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    return Instances(
        image_size,
        gt_boxes=Boxes(torch.from_numpy(np.array(boxes))),
        gt_classes=torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64),
    )


def _refuse_masks_and_keypoints(annotation: dict) -> None:
    for key in ("segmentation", "keypoints"):
        if key in annotation:
            raise NotImplementedError(
                f"annotations with {key!r} need the real detectron2; its subset here handles boxes"
            )


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Instances | tuple[Instances, torch.Tensor]:
    """Keep the instances whose boxes have both sides larger than ``box_threshold``.

    Args:
        instances: with ``gt_boxes``.
        by_box: filter by box; without it nothing is filtered, as there are no masks.
        by_mask: has no effect, see ``by_box``.
        box_threshold: in pixels.
        return_mask: also return the boolean mask of what was kept.
    """
    assert by_box or by_mask, "filter by box, by mask, or both"
    if not by_box:
        return instances
    keep = instances.gt_boxes.nonempty(threshold=box_threshold)
    return (instances[keep], keep) if return_mask else instances[keep]


def check_metadata_consistency(key: str, dataset_names: Sequence[str]) -> None:
    """Raise ValueError unless all data sets have the same metadata ``key``.

    Raises:
        AttributeError: if one does not have it at all.
    """
    values: list[tuple[str, Any]] = [
        (name, getattr(MetadataCatalog.get(name), key)) for name in dataset_names
    ]
    for name, value in values[1:]:
        first_name, first = values[0]
        if value != first:
            raise ValueError(
                f"data sets differ in {key!r}: {first_name} has {first}, {name} has {value}"
            )
