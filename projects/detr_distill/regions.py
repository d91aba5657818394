"""Which parts of a feature map matter: where boxes are, and where activations are strong."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .context import DistillationContext


def boxes_in_cells(
    context: DistillationContext, shape: tuple[int, int], padded: bool = True
) -> tuple[Tensor, Tensor]:
    """Ground-truth boxes in the units of a map's cells.

    Args:
        context: with the ground truth.
        shape: (h, w) of the map.
        padded: the map spans the padded batch. If not, it is taken to span every unpadded image,
            which stretches the boxes of images that are padded.

    Returns:
        Boxes (B, G, 4) xyxy, where G is the largest number in an image, but at least 1; and which
        of them are there, (B, G).
    """
    features = context.student.features
    marked = [F.pad(target["boxes_xyxy"], (0, 1), value=1.0) for target in context.targets]
    marked.append(marked[0].new_zeros(1, 5))  # G is at least 1
    boxes, there = pad_sequence(marked, batch_first=True)[:-1].split([4, 1], dim=-1)
    cells = boxes.new_tensor([shape[1], shape[0]] * 2)
    if padded:
        pixels = boxes.new_tensor([features.padded_size[1], features.padded_size[0]] * 2)
    else:
        pixels = features.sizes().flip(-1).repeat(1, 2).unsqueeze(1)
    return boxes * cells / pixels, there.squeeze(-1) > 0  # in this order an edge stays an edge


def activation_attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Where, and in which channels, the mean absolute activation is large.

    Args:
        features: (B, C, H, W).
        temperature: of the softmax.

    Returns:
        Weights of the cells (B, H, W) and of the channels (B, C), each 1 on average.
    """
    strength = features.abs()
    cells = (strength.mean(1).flatten(1) / temperature).softmax(-1)
    channels = (strength.mean((2, 3)) / temperature).softmax(-1)
    return (
        (cells * cells.shape[1]).unflatten(1, features.shape[2:]),
        channels * channels.shape[1],
    )
