"""The layout of the released single-scale SMCA."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from detectors.conversion.classes import BACKGROUND
from detectors.conversion.layout import Layout, layers, modules
from detectors.conversion.official import DETR

_DECODER = r"transformer\.decoder\.layers"


def drop_background(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the row for the background, which is no target of a focal loss.

    Args:
        weights: by the released names; the class head has a row for each of COCO's category ids
            from 0 on, and that one.
    """
    return {
        key: value[:BACKGROUND]
        if key.startswith("class_embed.") and len(value) == BACKGROUND + 1
        else value
        for key, value in weights.items()
    }


SMCA = Layout(
    name="smca",
    origin="gaopengcuhk/SMCA-DETR, single scale",
    has=(r"transformer\.decoder\.layers\.0\.point1\.layers\.0\.weight",),
    unpack=drop_background,
    rules=(
        *DETR.rules,
        *layers(
            _DECODER,
            "transformer.decoder.layers",
            {
                "norm4": "modulation.norm",
                "point2": "modulation.offsets",
                "point3": "modulation.scales",
            },
        ),
        *modules({rf"{_DECODER}\.0\.point1": "transformer.decoder.center_head"}),
    ),
)
