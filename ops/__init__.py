"""Compiled operators, each beside its pure-PyTorch reference."""

from .assignment import linear_sum_assignment
from .deformable_attention import multi_scale_deformable_attention
from .deformable_module import MultiScaleDeformableAttention
from .gaussian_attention import gaussian_attention

__all__ = [
    "MultiScaleDeformableAttention",
    "gaussian_attention",
    "linear_sum_assignment",
    "multi_scale_deformable_attention",
]
