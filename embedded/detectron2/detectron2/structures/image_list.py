"""Images of different sizes, padded into one batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class ImageList:
    """A padded batch and the sizes its images had before padding.

    Attributes:
        tensor: shape (B, ..., H, W); each image sits in the top left corner of its slot.
        image_sizes: (h, w) of every image.
    """

    def __init__(self, tensor: torch.Tensor, image_sizes: list[tuple[int, int]]):
        """Wrap a batch that is padded already."""
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> torch.Tensor:
        """Return one image without its padding, shape (..., h, w)."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    def to(self, *args: Any, **kwargs: Any) -> "ImageList":
        """Return the batch with ``Tensor.to`` applied."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> torch.device:
        """Where the batch is stored."""
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: Sequence[torch.Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: Mapping[str, int] | None = None,
    ) -> "ImageList":
        """Pad images at the bottom and right to a common size and stack them.

        Args:
            tensors: images of shape (..., h, w), equal but for the last two dimensions.
            size_divisibility: if above 1, height and width of the batch become its multiples.
            pad_value: value of the padding.
            padding_constraints: may hold ``"size_divisibility"``, which then replaces the
                argument, and ``"square_size"``: if positive, the batch has this height and width.

        Raises:
            AssertionError: for no images, or images that differ in other dimensions.
            RuntimeError: if an image is larger than ``square_size``.
        """
        assert len(tensors) > 0, "no images to put into a batch"
        assert isinstance(tensors, (list, tuple)), f"expected a list, found {type(tensors)}"
        leading = tensors[0].shape[:-2]
        assert all(t.shape[:-2] == leading for t in tensors), (
            f"images differ in more than size: {[tuple(t.shape) for t in tensors]}"
        )
        constraints = padding_constraints or {}
        divisor = constraints.get("size_divisibility", size_divisibility)
        square = constraints.get("square_size", 0)

        sizes = [(t.shape[-2], t.shape[-1]) for t in tensors]
        height, width = (square, square) if square > 0 else map(max, zip(*sizes, strict=True))
        if divisor > 1:
            height = (height + divisor - 1) // divisor * divisor
            width = (width + divisor - 1) // divisor * divisor

        batch = tensors[0].new_full((len(tensors), *leading, height, width), pad_value)
        for index, (h, w) in enumerate(sizes):
            batch[index, ..., :h, :w].copy_(tensors[index])
        return ImageList(batch, sizes)
