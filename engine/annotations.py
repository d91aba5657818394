"""What is wrong with an annotation file in COCO's format."""

import json
from numbers import Real
from pathlib import Path
from typing import Any

from .boxes import is_box
from .errors import UserError

__all__ = ["check_evaluable", "explain_fault"]

# What evaluation reads of an annotation besides its box and category. Without areas, the AP of
# small, medium and large objects would be wrong and nothing would say so.
_EVALUATED = {"id": "a number", "area": "the object's size in pixels", "iscrowd": "0 or 1"}


def explain_fault(path: str | Path | None) -> None:
    """Say what makes an annotation file unusable; nothing if that is not found.

    Raises:
        UserError: names the file and the entry.
    """
    if path is None:
        return
    content = _read(path)
    images, categories = _entries(content, path, "images"), _entries(content, path, "categories")
    if not images or not categories:
        raise UserError(f"{path} lists {len(images)} images and {len(categories)} categories")
    for image in images:
        _check_image(image, f"{path}: image {image.get('id')}")
    listed = [category.get("id") for category in categories]
    for annotation in _entries({"annotations": [], **content}, path, "annotations"):
        _check_annotation(annotation, listed, f"{path}: annotation {annotation.get('id')}")


def check_evaluable(path: str | Path) -> None:
    """Stop if COCO's evaluation would fail on a file's annotations, or misread them.

    Raises:
        UserError: names the file and the annotation.
    """
    content = _read(path)
    listed = [category.get("id") for category in _entries(content, path, "categories")]
    for annotation in _entries({"annotations": [], **content}, path, "annotations"):
        which = f"{path}: annotation {annotation.get('id')}"
        _check_annotation(annotation, listed, which)
        read = {"iscrowd": 0, **annotation}
        for key, meaning in _EVALUATED.items():
            if not isinstance(read.get(key), Real):
                raise UserError(
                    f"{which} has the {key} {read.get(key)!r}, which evaluation needs: "
                    f"expected {meaning}"
                )


def _read(path: str | Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a COCO annotation file: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a COCO annotation file: it holds a {type(content).__name__}, "
            "expected a dict of images, annotations and categories"
        )
    return content


def _entries(content: dict[str, Any], path: str | Path, key: str) -> list[dict]:
    """The list of dicts at ``key``."""
    found = content.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        what = "is missing" if key not in content else f"is of type {type(found).__name__}"
        raise UserError(
            f"{path} is not a COCO annotation file: '{key}' {what}, expected a list of dicts"
        )
    return found


def _check_image(image: dict, which: str) -> None:
    if "id" not in image:
        raise UserError(f"{which}: an image of the name {image.get('file_name')} has no id")
    if not isinstance(image.get("file_name"), str):
        raise UserError(f"{which} has the file_name {image.get('file_name')}, expected a name")
    for side in ("height", "width"):
        if not isinstance(image.get(side), Real):
            raise UserError(f"{which} has the {side} {image.get(side)!r}, expected pixels")


def _check_annotation(annotation: dict, categories: list, which: str) -> None:
    category = annotation.get("category_id")
    if category not in categories:
        raise UserError(f"{which} has category_id {category}, which is not listed in 'categories'")
    bbox = annotation.get("bbox")
    if isinstance(bbox, list) and len(bbox) != 4:
        raise UserError(f"{which} has a bbox of {len(bbox)} numbers, expected 4")
    if not is_box(bbox):
        raise UserError(f"{which} has the bbox {bbox!r}, expected 4 numbers")
