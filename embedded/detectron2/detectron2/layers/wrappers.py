"""Torch functions and modules with a little added."""

import torch
from torch import Tensor, nn

__all__ = ["Conv2d", "cat"]


def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenate; a single tensor is handed back as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class Conv2d(nn.Conv2d):
    """Convolution followed by the optional keyword arguments ``norm`` and ``activation``."""

    def __init__(self, *args, **kwargs):
        norm, activation = kwargs.pop("norm", None), kwargs.pop("activation", None)
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate; a batch of size 0 is fine."""
        out = super().forward(x)
        for step in (self.norm, self.activation):
            if step is not None:
                out = step(out)
        return out
