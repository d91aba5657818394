"""Random arguments of Gaussian-modulated attention, and its dense formula."""

from __future__ import annotations

import torch
from torch import Tensor

Arguments = dict[str, Tensor | tuple[int, int] | None]
LEAVES = ("query", "key", "value", "centers", "precision")


def example(
    shape=(5, 7),
    images=2,
    heads=3,
    queries=6,
    channels=5,
    value_channels=4,
    shared=False,
    padded=False,
    strength=0.5,
    seed=0,
    dtype=torch.float64,
) -> Arguments:
    """Random arguments by name; with ``padded`` the right part of the last image is masked."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    places = (images, 1 if shared else heads, queries, 2)
    mask = torch.zeros(images, height, width, dtype=torch.bool)
    mask[-1:, :, (width + 1) // 2 :] = True
    tensors = {
        "query": draw(images, heads, queries, channels),
        "key": draw(images, heads, height * width, channels),
        "value": draw(images, heads, height * width, value_channels),
        "centers": draw(*places).sigmoid() * torch.tensor([width, height]),
        "precision": draw(*places).square() * strength,
    }
    given = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return given | {
        "spatial_shape": shape,
        "key_padding_mask": mask.flatten(1) if padded else None,
    }


def dense(
    query, key, value, spatial_shape, centers, precision, key_padding_mask, scale=None, kept=1.0
) -> Tensor:
    """The formula with all its logits; ``kept`` multiplies the weights."""
    height, width = spatial_shape
    cells = torch.tensor([[x, y] for y in range(height) for x in range(width)], dtype=query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    offsets = cells.reshape(-1, 2) - centers[:, :, :, None]
    logits = query @ key.mT * scale - (precision[:, :, :, None] * offsets**2).sum(-1)
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None], -torch.inf)
    return (logits.softmax(-1).nan_to_num() * kept) @ value


def with_gradients(call, arguments: Arguments, **options) -> tuple[Tensor, ...]:
    """Output and the gradients of its weighted sum."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in LEAVES}
    output = call(**{**arguments, **leaves}, **options)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    grads = torch.autograd.grad((output * weight.to(output.dtype)).sum(), list(leaves.values()))
    return output, *grads


def in_double(arguments: Arguments) -> Arguments:
    return {
        name: item.double() if isinstance(item, Tensor) and item.is_floating_point() else item
        for name, item in arguments.items()
    }
