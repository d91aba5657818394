"""The augmentations of the DETR recipes. All randomness comes from numpy's global generator."""

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    Transform,
    VFlipTransform,
)
from PIL.Image import Resampling

from .augmentation import Augmentation, _as_augmentation
from .transform import ResizeTransform

__all__ = ["RandomApply", "RandomCrop", "RandomFlip", "Resize", "ResizeShortestEdge"]


class RandomApply(Augmentation):
    """Apply an augmentation or a transform with probability ``prob``."""

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5):
        """Wrap ``tfm_or_aug``; AssertionError unless ``prob`` lies in [0, 1]."""
        assert 0.0 <= prob <= 1.0, f"a probability lies in [0, 1], found {prob}"
        self.aug = _as_augmentation(tfm_or_aug)
        self.prob = prob

    def get_transform(self, *args: Any) -> Transform:
        """Choose the wrapped transform or none."""
        return self.aug.get_transform(*args) if _happens(self.prob) else NoOpTransform()

    def __call__(self, aug_input: Any) -> Transform:
        """Apply the wrapped augmentation in place, or do nothing; return what was done."""
        return self.aug(aug_input) if _happens(self.prob) else NoOpTransform()


class RandomFlip(Augmentation):
    """Flip the image in one direction with probability ``prob``."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        """Take the one direction to flip in; ValueError for none or both."""
        if horizontal == vertical:
            raise ValueError(
                f"flip either horizontally or vertically, found {horizontal=}, {vertical=}"
            )
        self.prob = prob
        self.horizontal = horizontal
        self.vertical = vertical

    def get_transform(self, image: np.ndarray) -> Transform:
        """Choose a flip or nothing."""
        height, width = image.shape[:2]
        if not _happens(self.prob):
            return NoOpTransform()
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


class Resize(Augmentation):
    """Resize to a fixed (height, width)."""

    def __init__(self, shape: int | Sequence[int], interp: int = Resampling.BILINEAR.value):
        """Take the size, one number for a square, and Pillow's interpolation method."""
        self.shape = (shape, shape) if isinstance(shape, int) else (shape[0], shape[1])
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Return the resize from this image's size."""
        height, width = image.shape[:2]
        return ResizeTransform(height, width, *self.shape, self.interp)


class ResizeShortestEdge(Augmentation):
    """Scale the shorter side to a sampled length, unless the longer one then exceeds ``max_size``.

    In that case the longer side becomes ``max_size``. The aspect ratio stays.
    """

    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = Resampling.BILINEAR.value,
    ):
        """Set how the length is sampled.

        Args:
            short_edge_length: the length; or (smallest, largest) for the style "range"; or the
                lengths to choose from for the style "choice".
            max_size: limit of the longer side.
            sample_style: "range" or "choice".
            interp: Pillow's interpolation method.
        """
        assert sample_style in ("range", "choice"), (
            f"sample_style must be 'range' or 'choice', found {sample_style!r}"
        )
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        assert sample_style == "choice" or len(short_edge_length) == 2, (
            f"sample_style 'range' needs two lengths, found {short_edge_length}"
        )
        self.short_edge_length = tuple(short_edge_length)
        self.max_size = max_size
        self.sample_style = sample_style
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Sample a length; 0 means that the image keeps its size."""
        if self.sample_style == "range":
            low, high = self.short_edge_length
            length = np.random.randint(low, high + 1)
        else:
            length = np.random.choice(self.short_edge_length)
        if length == 0:
            return NoOpTransform()
        height, width = image.shape[:2]
        new_size = self.get_output_shape(height, width, length, self.max_size)
        return ResizeTransform(height, width, *new_size, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """Return the new (height, width), each rounded to the nearest integer, halves up."""
        # The order of these float operations decides ties, hence sizes, so it is part of the API.
        length = float(short_edge_length)
        scale = length / min(oldh, oldw)
        height, width = (length, scale * oldw) if oldh < oldw else (scale * oldh, length)
        longer = max(height, width)
        if longer > max_size:
            shrink = float(max_size) / longer
            height, width = height * shrink, width * shrink
        return int(height + 0.5), int(width + 0.5)


class RandomCrop(Augmentation):
    """Cut a random rectangle out of the image; boxes are shifted, not clipped or dropped."""

    def __init__(self, crop_type: str, crop_size: Sequence[float]):
        """Set how the size of the rectangle is found.

        Args:
            crop_type: what ``crop_size`` means, see there.
            crop_size: for "relative", fractions of the image's (height, width); for
                "relative_range", the lower ends of ranges up to 1 from which these fractions are
                sampled; for "absolute", (height, width) in pixels; for "absolute_range",
                (smallest, largest), the range in pixels from which both sides are sampled. Sizes in
                pixels are limited to the image's own.
        """
        assert crop_type in self._SIZES, (
            f"crop_type must be one of {sorted(self._SIZES)}, found {crop_type!r}"
        )
        self.crop_type = crop_type
        self.crop_size = tuple(crop_size)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Sample size and place of the rectangle."""
        height, width = image.shape[:2]
        crop_height, crop_width = self.get_crop_size((height, width))
        assert crop_height <= height, f"crop of height {crop_height} from an image of {height}"
        assert crop_width <= width, f"crop of width {crop_width} from an image of {width}"
        top = np.random.randint(height - crop_height + 1)
        left = np.random.randint(width - crop_width + 1)
        return CropTransform(left, top, crop_width, crop_height)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Sample the (height, width) of the rectangle for an image of the given size."""
        return self._SIZES[self.crop_type](self, *image_size)

    def _relative(self, height: int, width: int) -> tuple[int, int]:
        return _fraction_of(height, width, self.crop_size)

    def _relative_range(self, height: int, width: int) -> tuple[int, int]:
        lowest = np.asarray(self.crop_size, dtype=np.float32)
        fractions = lowest + np.random.rand(2) * (1 - lowest)
        return _fraction_of(height, width, fractions.tolist())

    def _absolute(self, height: int, width: int) -> tuple[int, int]:
        crop_height, crop_width = map(int, self.crop_size)
        return min(crop_height, height), min(crop_width, width)

    def _absolute_range(self, height: int, width: int) -> tuple[int, int]:
        low, high = map(int, self.crop_size)
        assert low <= high, f"crop_size is (smallest, largest), found {self.crop_size}"
        crop_height = np.random.randint(min(height, low), min(height, high) + 1)
        crop_width = np.random.randint(min(width, low), min(width, high) + 1)
        return crop_height, crop_width

    _SIZES: ClassVar = {
        "relative": _relative,
        "relative_range": _relative_range,
        "absolute": _absolute,
        "absolute_range": _absolute_range,
    }


def _happens(probability: float) -> bool:
    return np.random.uniform() < probability


def _fraction_of(height: int, width: int, fractions: Sequence[float]) -> tuple[int, int]:
    return int(height * fractions[0] + 0.5), int(width * fractions[1] + 0.5)
