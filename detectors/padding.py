"""Where images of a batch are padded, in pixels and in cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn


class PaddingRules(nn.Module):
    """A module that may treat padding in training in another way than in evaluation."""

    padding_options: ClassVar[tuple[str, ...]] = ()
    """Names of the options that say how it does in training."""
    pads_as_in_training: bool = False
    """Do so in evaluation too: for a teacher, which sees the batches of its student's training."""

    @property
    def follows_training(self) -> bool:
        """Whether padding is now treated as in training."""
        return self.training or self.pads_as_in_training


def padding_of(images: ImageList) -> Tensor:
    """Mask of the padded pixels (B, H, W), as float: 1 on padding."""
    mask = torch.ones(len(images), *images.tensor.shape[-2:], device=images.tensor.device)
    for row, (height, width) in enumerate(images.image_sizes):
        mask[row, :height, :width] = 0
    return mask


def no_padding(level: Tensor) -> Tensor:
    """The mask (B, H, W) of a map (B, C, H, W) without any."""
    return torch.zeros(level.shape[0], *level.shape[-2:], dtype=torch.bool, device=level.device)


def resize_mask(mask: Tensor, level: Tensor) -> Tensor:
    """Nearest-neighbour down-sampling of a float mask (B, H, W) to a level's size, as bool."""
    return F.interpolate(mask[None], size=level.shape[-2:])[0].to(torch.bool)


def stack_padded(maps: Iterable[Tensor], value: float | bool) -> Tensor:
    """Maps (1, ..., H, W) of different sizes as one, padded at the bottom and right."""
    maps = list(maps)
    height, width = (max(each.shape[axis] for each in maps) for axis in (-2, -1))
    sides = [(0, width - each.shape[-1], 0, height - each.shape[-2]) for each in maps]
    return torch.cat([F.pad(*each, value=value) for each in zip(maps, sides, strict=True)])
