"""Box formats, a container of xyxy boxes, and their pairwise overlap."""

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch

_RawBox = TypeVar("_RawBox", list, tuple, np.ndarray, torch.Tensor)


class BoxMode(IntEnum):
    """How the numbers of a box are to be read; the relative modes only have names."""

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2
    XYWH_REL = 3
    XYWHA_ABS = 4  # centre, size and counter-clockwise angle in degrees

    @staticmethod
    def convert(box: _RawBox, from_mode: "BoxMode", to_mode: "BoxMode") -> _RawBox:
        """Return ``box`` in another mode, in the container and dtype it came in.

        Args:
            box: one box as a list or tuple, or an array or tensor of shape (N, 4) or (N, 5).
            from_mode: mode of ``box``.
            to_mode: mode wanted.

        Raises:
            AssertionError: for a malformed box or a relative mode.
            NotImplementedError: for a pair of modes without a conversion.
        """
        if from_mode == to_mode:
            return box
        from_mode, to_mode = BoxMode(from_mode), BoxMode(to_mode)
        relative = {BoxMode.XYXY_REL, BoxMode.XYWH_REL}
        assert not relative & {from_mode, to_mode}, (
            f"box modes relative to the image are not supported: {from_mode.name}, {to_mode.name}"
        )
        converter = _CONVERTERS.get((from_mode, to_mode))
        if converter is None:
            raise NotImplementedError(f"no conversion from {from_mode.name} to {to_mode.name}")

        if isinstance(box, torch.Tensor):
            return converter(box)
        if isinstance(box, np.ndarray):
            return converter(torch.from_numpy(box)).numpy()
        assert len(box) in (4, 5), f"a box has 4 or 5 numbers, found {len(box)}: {box}"
        return type(box)(converter(torch.tensor(box)[None])[0].tolist())


def _xywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    out = boxes.clone()
    out[:, 2:4] = boxes[:, :2] + boxes[:, 2:4]
    return out


def _xyxy_to_xywh(boxes: torch.Tensor) -> torch.Tensor:
    out = boxes.clone()
    out[:, 2:4] = boxes[:, 2:4] - boxes[:, :2]
    return out


def _xywh_to_xywha(boxes: torch.Tensor) -> torch.Tensor:
    wide = boxes.double()
    size = wide[:, 2:4]
    upright = torch.zeros_like(wide[:, :1])
    return torch.cat([wide[:, :2] + size / 2, size, upright], dim=1).to(boxes.dtype)


def _xywha_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    assert boxes.shape[1] == 5, f"a rotated box has 5 numbers, found {boxes.shape[1]}"
    center, size, degrees = boxes.double().split([2, 2, 1], dim=1)
    angle = degrees * (math.pi / 180)
    # Extent of the rotated rectangle along each axis: its own side plus the other one, projected.
    half = (angle.cos().abs() * size + angle.sin().abs() * size.flip(1)) / 2
    return torch.cat([center - half, center + half], dim=1).to(boxes.dtype)


_CONVERTERS = {
    (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS): _xywh_to_xyxy,
    (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS): _xyxy_to_xywh,
    (BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS): _xywh_to_xywha,
    (BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS): _xywha_to_xyxy,
}


class Boxes:
    """A float32 tensor of shape (N, 4) holding absolute xyxy boxes."""

    def __init__(self, tensor: torch.Tensor):
        """Wrap ``tensor``, or any nested sequence of shape (N, 4); an empty one becomes (0, 4)."""
        tensor = torch.as_tensor(tensor, dtype=torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        assert tensor.shape[1:] == (4,), f"boxes need shape (N, 4), found {tuple(tensor.shape)}"
        self.tensor = tensor

    def clone(self) -> "Boxes":
        """Return a copy with its own storage."""
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device) -> "Boxes":
        """Return the boxes on another device."""
        return Boxes(self.tensor.to(device=device))

    def _sizes(self) -> torch.Tensor:
        return self.tensor[:, 2:] - self.tensor[:, :2]

    def area(self) -> torch.Tensor:
        """Return width times height of each box, shape (N,)."""
        return self._sizes().prod(dim=1)

    def clip(self, box_size: tuple[int, int]) -> None:
        """Limit the boxes, in place, to an image of size (height, width)."""
        assert self.tensor.isfinite().all(), "boxes hold infinite or NaN coordinates"
        height, width = box_size
        x0, y0, x1, y1 = self.tensor.unbind(dim=1)
        self.tensor = torch.stack(
            [x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)],
            dim=1,
        )

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        """Return a boolean (N,), True where both sides are larger than ``threshold``."""
        return (self._sizes() > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> torch.Tensor:
        """Return a boolean (N,), True where a box stays within a (height, width) reference.

        A box may stick out by ``boundary_threshold``; touching the far edges counts as outside.
        """
        height, width = box_size
        far_edge = self.tensor.new_tensor([width, height]) + boundary_threshold
        low_ok = self.tensor[:, :2] >= -boundary_threshold
        high_ok = self.tensor[:, 2:] < far_edge
        return (low_ok & high_ok).all(dim=1)

    def get_centers(self) -> torch.Tensor:
        """Return the (x, y) centres, shape (N, 2)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply x and y coordinates, in place."""
        for axis, factor in enumerate((scale_x, scale_y)):
            for column in (axis, axis + 2):
                self.tensor[:, column].mul_(factor)

    @classmethod
    def cat(cls, boxes_list: list["Boxes"]) -> "Boxes":
        """Join several containers into one that shares no storage with them."""
        assert isinstance(boxes_list, (list, tuple)), f"expected a list, found {type(boxes_list)}"
        assert all(isinstance(boxes, Boxes) for boxes in boxes_list), "expected a list of Boxes"
        if not boxes_list:
            return cls(torch.empty(0))
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]))

    @property
    def device(self) -> torch.device:
        """Where the boxes are stored."""
        return self.tensor.device

    def __getitem__(self, item: int | slice | torch.Tensor | Sequence[int]) -> "Boxes":
        """Select boxes; a single index keeps the container, with one box."""
        chosen = self.tensor[item]
        if isinstance(item, int):
            chosen = chosen[None]
        assert chosen.dim() == 2, f"indexing boxes with {item} gives shape {tuple(chosen.shape)}"
        return Boxes(chosen)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield one tensor of shape (4,) per box."""
        return iter(self.tensor)

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Return the intersection over union of every pair, shape (N, M); 0 without intersection."""
    first, second = boxes1.tensor[:, None], boxes2.tensor[None]
    top_left = torch.maximum(first[..., :2], second[..., :2])
    bottom_right = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=2)
    union = boxes1.area()[:, None] + boxes2.area() - intersection
    return torch.where(intersection > 0, intersection / union, intersection.new_zeros(()))
