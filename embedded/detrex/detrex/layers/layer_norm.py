"""Layer normalisation over the channels, wherever they are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LayerNorm"]


class LayerNorm(nn.Module):
    """Normalise the channels: the last axis, or axis 1 with ``channel_last=False``."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, normalized_shape, eps=1e-6, channel_last=True):
        super().__init__()
        self.normalized_shape = (normalized_shape,)
        self.eps, self.channel_last = eps, channel_last
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            initial = torch.empty(normalized_shape).fill_(value)
            self.register_parameter(name, nn.Parameter(initial))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (..., C), or (B, C, ...) with ``channel_last=False``."""
        if not self.channel_last:
            x = x.movedim(1, -1)
        out = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return out if self.channel_last else out.movedim(-1, 1)
