"""Transforms that fvcore does not have."""

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import Transform
from PIL import Image
from PIL.Image import Resampling

__all__ = ["ResizeTransform"]

_TORCH_MODES: dict[int, dict] = {
    Resampling.NEAREST: {"mode": "nearest"},
    Resampling.BILINEAR: {"mode": "bilinear", "align_corners": False},
    Resampling.BICUBIC: {"mode": "bicubic", "align_corners": False},
}


class ResizeTransform(Transform):
    """Resize an image of size (h, w) to (new_h, new_w)."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None):
        """Use ``interp``, one of Pillow's methods, for images; bilinear if None."""
        super().__init__()
        self.h, self.w = h, w
        self.new_h, self.new_w = new_h, new_w
        self.interp = Resampling.BILINEAR if interp is None else interp

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image of shape (h, w) or (h, w, C).

        uint8 images go through Pillow, which smooths when it shrinks; others through torch, which
        does not.
        """
        assert img.shape[:2] == (self.h, self.w), (
            f"image has size {img.shape[:2]}, the transform was made for {(self.h, self.w)}"
        )
        interp = self.interp if interp is None else interp
        resize = _resize_with_pillow if img.dtype == np.uint8 else _resize_with_torch
        return resize(img, (self.new_h, self.new_w), interp)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scale (x, y) points of shape (N, 2), in place."""
        coords[:, 0] *= self.new_w / self.w
        coords[:, 1] *= self.new_h / self.h
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resize a label map without mixing its values."""
        return self.apply_image(segmentation, interp=Resampling.NEAREST)

    def inverse(self) -> "ResizeTransform":
        """Return the transform back to the original size."""
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


def _resize_with_pillow(image: np.ndarray, size_hw: tuple[int, int], interp: int) -> np.ndarray:
    one_channel = image.ndim == 3 and image.shape[2] == 1
    picture = Image.fromarray(image[..., 0] if one_channel else image)
    resized = np.asarray(picture.resize(size_hw[::-1], interp))
    return resized[..., None] if one_channel else resized


def _resize_with_torch(image: np.ndarray, size_hw: tuple[int, int], interp: int) -> np.ndarray:
    channels = image.reshape(*image.shape[:2], -1)
    planes = torch.from_numpy(np.ascontiguousarray(channels)).permute(2, 0, 1)
    resized = F.interpolate(planes[None], size_hw, **_TORCH_MODES[interp])[0]
    return resized.permute(1, 2, 0).numpy().reshape(*size_hw, *image.shape[2:])
