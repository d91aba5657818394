"""From decoder states to logits and boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detrex.utils import inverse_sigmoid
from torch import Tensor, nn

from .structures import Denoising, Group, Predictions, repeat_rows

_RARE = 0.01
"""Probability of every class before any training (focal loss: Lin et al., 2017, Sec. 4.1)."""


def make_classes_rare(output: nn.Linear) -> None:
    """Give every class the same small probability, whatever the weights, by the bias of a head."""
    nn.init.constant_(output.bias, -math.log((1 - _RARE) / _RARE))


def make_zero(output: nn.Module) -> None:
    """Let a box head start with offsets of zero."""
    for parameter in output.parameters():
        nn.init.zeros_(parameter)


def apply_heads(heads: nn.Module, states: Tensor, groups: Sequence[Group]) -> Tensor:
    """Apply one head to all groups' states (G, B, N, C), or each of a list to its decoder layer."""
    if not isinstance(heads, nn.ModuleList):
        return heads(states)
    return torch.stack(
        [heads[group.layer](state) for state, group in zip(states, groups, strict=True)]
    )


def decode_boxes(offsets: Tensor, references: Tensor | None, epsilon: float = 1e-3) -> Tensor:
    """Boxes (..., 4) cxcywh in [0, 1] from offsets to the logits of references.

    Args:
        offsets: (..., 4).
        references: (..., 2 or 4) in [0, 1]; what they lack, or all if None, starts from 0.5. They
            are repeated along the first axis as :func:`~detectors.structures.repeat_rows` does.
    """
    if references is None:
        return offsets.sigmoid()
    start = repeat_rows(inverse_sigmoid(references.to(offsets.dtype), epsilon), offsets)
    if start.shape[-1] == 4:
        return (offsets + start).sigmoid()
    return torch.cat([offsets[..., :2] + start, offsets[..., 2:]], dim=-1).sigmoid()


def split_denoised(predictions: Predictions, denoising: Denoising | None) -> Predictions:
    """Take the noised targets' predictions, the first ones, out of the others."""
    if denoising is None:
        return predictions
    logits, boxes = predictions.logits, predictions.boxes
    count = denoising.count
    denoised = Predictions(logits[:, :, :count], boxes[:, :, :count], predictions.groups)
    return Predictions(
        logits[:, :, count:],
        boxes[:, :, count:],
        predictions.groups,
        denoised,
        denoising,
        predictions.proposals,
    )
