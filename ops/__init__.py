"""Compiled operators, each beside its pure-PyTorch reference."""

from .assignment import linear_sum_assignment
from .convolution import convolution_3x3
from .deformable_attention import multi_scale_deformable_attention
from .deformable_module import MultiScaleDeformableAttention
from .dropout import dropout_add, relu_dropout
from .feed_forward import relu_feed_forward
from .gaussian_attention import gaussian_attention
from .linear_layer import Linear, linear
from .pixel_convolution import convolution_1x1

__all__ = [
    "Linear",
    "MultiScaleDeformableAttention",
    "convolution_1x1",
    "convolution_3x3",
    "dropout_add",
    "gaussian_attention",
    "linear",
    "linear_sum_assignment",
    "multi_scale_deformable_attention",
    "relu_dropout",
    "relu_feed_forward",
]
