"""Which tokens are foreground, from ground-truth boxes (KS-DETR, Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from detectors.structures import FeatureMaps, Targets

Interpolation = Literal["bilinear", "nearest"]


def foreground_mask(
    features: FeatureMaps,
    targets: Targets,
    box_padding: int = 0,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Mark the tokens whose sample of the pixel mask would touch a box.

    The released code draws the boxes into a pixel mask, resizes it bilinearly with aligned corners
    and keeps what is not zero. A token reads up to two rows and two columns of pixels, so a box
    marks it exactly when it covers one of the rows and one of the columns: no pixels are drawn.

    Args:
        features: the maps whose tokens are marked.
        targets: with ``boxes_xyxy`` in pixels, truncated to integers; the far ends are exclusive.
        box_padding: pixels by which boxes grow on every side, kept inside the image.
        interpolation: ``bilinear`` as released; with ``nearest`` a token reads the one pixel that
            the padding mask's resize reads too.

    Returns:
        (B, S) bool.
    """
    pixels = _PIXELS[interpolation]
    boxes = _stack_boxes(targets, features.image_sizes, box_padding)
    padded_height, padded_width = features.padded_size
    masks = []
    for height, width in features.spatial_shapes:
        rows = _covers(boxes[..., 1::2], pixels(padded_height, height, boxes.device))
        columns = _covers(boxes[..., 0::2], pixels(padded_width, width, boxes.device))
        covered = rows.unsqueeze(-1) & columns.unsqueeze(-2)  # (B, G, h, w)
        masks.append(covered.any(dim=1).flatten(1))
    return torch.cat(masks, dim=1)


def _stack_boxes(
    targets: Targets, image_sizes: Sequence[tuple[int, int]], box_padding: int
) -> Tensor:
    """Integer boxes (B, G, 4) of all images; rows that no box uses are empty boxes."""
    boxes = torch.nn.utils.rnn.pad_sequence(
        [target["boxes_xyxy"] for target in targets], batch_first=True
    ).long()
    if box_padding > 0:
        used = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(target["boxes_xyxy"]) for target in targets], batch_first=True
        ).bool()
        grown = boxes + boxes.new_tensor([-box_padding] * 2 + [box_padding] * 2)
        limits = boxes.new_tensor([[width, height] * 2 for height, width in image_sizes])
        grown = torch.minimum(grown, limits.unsqueeze(1)).clamp(min=0)
        boxes = torch.where(used, grown, boxes)
    return boxes


def _covers(spans: Tensor, pixels: Sequence[Tensor]) -> Tensor:
    """Which tokens read a pixel in ``[start, end)`` along an axis.

    Args:
        spans: (B, G, 2) integer starts and ends.
        pixels: (cells,) each: the pixels that the tokens read.

    Returns:
        (B, G, cells) bool.
    """
    start, end = spans[..., :1], spans[..., 1:]
    read = [(start <= pixel) & (pixel < end) for pixel in pixels]
    return read[0] if len(read) == 1 else read[0] | read[1]


def _bilinear(length: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two pixels of an axis that each aligned-corner sample weighs, which may be one."""
    # float32 as in the resize that this stands for: rounding decides whether a neighbour is read
    step = torch.full((), length - 1, dtype=torch.float32, device=device) / max(cells - 1, 1)
    position = torch.arange(cells, dtype=torch.float32, device=device) * step
    low = position.floor().clamp(max=length - 1)
    return low, torch.where(position > low, (low + 1).clamp(max=length - 1), low)


def _nearest(length: int, cells: int, device: torch.device) -> tuple[Tensor]:
    """The pixel of an axis that each token reads."""
    step = torch.full((), length, dtype=torch.float32, device=device) / cells
    position = torch.arange(cells, dtype=torch.float32, device=device) * step
    return (position.floor().clamp(max=length - 1),)


_PIXELS = {"bilinear": _bilinear, "nearest": _nearest}
