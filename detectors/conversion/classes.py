"""The rows of COCO's categories among those of all category ids."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from detectron2.data import MetadataCatalog
from torch import Tensor

BACKGROUND = 91
"""The row after those of the ids 0 to 90: no object, or the label that no target has."""

_PER_CLASS = re.compile(
    r"(transformer\.decoder\.)?class_embed\.((?P<head>\d+)\.)?(weight|bias)"
    r"|denoising_generator\.label_encoder\.weight"
)


def select_classes(key: str, value: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
    """Keep the rows of the categories where there is one for each id and the model has 80 classes.

    The first class of a two-stage detector's last head means any object. That head keeps the first
    rows.

    Args:
        key: our name of the weight.
        value: (91 or 92, ...) for rows to be chosen.
        wanted: the model's state dict.
    """
    match = _PER_CLASS.fullmatch(key)
    if match is None:
        return value
    categories = [*MetadataCatalog.get("coco_2017_train").thing_dataset_id_to_contiguous_id]
    classes = len(categories)
    rows = len(wanted[key])
    if rows - classes not in (0, 1) or len(value) != rows - classes + BACKGROUND:
        return value
    if match["head"] is not None and _finds_proposals(int(match["head"]), wanted):
        return value[:rows]
    return value[[*categories, *[BACKGROUND] * (rows - classes)]]


def _finds_proposals(head: int, keys: Collection[str]) -> bool:
    two_stage = "transformer.enc_output.weight" in keys
    return two_stage and f"class_embed.{head + 1}.weight" not in keys
