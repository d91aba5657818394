"""Which tokens are foreground, from ground-truth boxes (KS-DETR, Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detectors.structures import FeatureMaps, Targets


def foreground_mask(features: FeatureMaps, targets: Targets, box_padding: int = 0) -> Tensor:
    """Mark the tokens whose bilinear sample of the pixel mask would touch a box.

    The released code draws the boxes into a pixel mask, resizes it bilinearly with aligned corners
    and keeps what is not zero. A token reads up to two rows and two columns of pixels, so a box
    marks it exactly when it covers one of the rows and one of the columns: no pixels are drawn.

    Args:
        features: the maps whose tokens are marked.
        targets: with ``boxes_xyxy`` in pixels, truncated to integers; the far ends are exclusive.
        box_padding: pixels by which boxes grow on every side, kept inside the image.

    Returns:
        (B, S) bool.
    """
    boxes = _stack_boxes(targets, features.image_sizes, box_padding)
    masks = []
    for height, width in features.spatial_shapes:
        rows = _covers(boxes[..., 1::2], features.padded_size[0], height)
        columns = _covers(boxes[..., 0::2], features.padded_size[1], width)
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


def _covers(spans: Tensor, pixels: int, cells: int) -> Tensor:
    """Which of ``cells`` aligned-corner samples read a pixel in ``[start, end)``.

    Args:
        spans: (B, G, 2) integer starts and ends.
        pixels: length of the axis in pixels.
        cells: length of the axis in tokens.

    Returns:
        (B, G, cells) bool.
    """
    # float32 as in the resize that this stands for: rounding decides whether a neighbour is read
    step = torch.full((), pixels - 1, dtype=torch.float32, device=spans.device) / max(cells - 1, 1)
    position = torch.arange(cells, dtype=torch.float32, device=spans.device) * step
    low = position.floor().clamp(max=pixels - 1)
    high = torch.where(position > low, (low + 1).clamp(max=pixels - 1), low)
    start, end = spans[..., :1], spans[..., 1:]
    return ((start <= low) & (low < end)) | ((start <= high) & (high < end))
