"""From decoder states to logits and boxes."""

from __future__ import annotations

import torch
from detrex.utils import inverse_sigmoid
from torch import Tensor, nn

from .structures import Denoising, Predictions


def apply_heads(heads: nn.Module, states: Tensor) -> Tensor:
    """Apply one head to all layers' states (L, R * B, N, C), or each of a list to its layer."""
    if not isinstance(heads, nn.ModuleList):
        return heads(states)
    return torch.stack([head(state) for head, state in zip(heads, states, strict=False)])


def decode_boxes(offsets: Tensor, references: Tensor | None) -> Tensor:
    """Boxes (..., 4) cxcywh in [0, 1] from offsets to the logits of references.

    Args:
        offsets: (..., 4).
        references: (..., 2 or 4) in [0, 1]; what they lack, or all if None, starts from 0.5.
    """
    if references is None:
        return offsets.sigmoid()
    start = inverse_sigmoid(references.to(offsets.dtype))
    if start.shape[-1] == 4:
        return (offsets + start).sigmoid()
    return torch.cat([offsets[..., :2] + start, offsets[..., 2:]], dim=-1).sigmoid()


def split_denoised(predictions: Predictions, denoising: Denoising | None) -> Predictions:
    """Take the noised targets' predictions, the first ones, out of the others."""
    if denoising is None:
        return predictions
    logits, boxes = predictions.logits, predictions.boxes
    count = denoising.count
    denoised = Predictions(logits[:, :, :count], boxes[:, :, :count], predictions.branches)
    return Predictions(
        logits[:, :, count:],
        boxes[:, :, count:],
        predictions.branches,
        denoised,
        denoising,
        predictions.proposals,
    )
