"""FGFI: only cells near objects are imitated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detectors.criterion import average_count

from .context import DistillationContext
from .features import FeatureObjective, Place, adapt_channels
from .regions import boxes_in_cells


class FGFI(FeatureObjective):
    """``sum over cells near objects of (A(F_S) - F_T)^2 / (2 * their number)``.

    A is a 3 x 3 convolution. A cell is near an object if one of its anchors overlaps a box by more
    than a share of the best overlap that this box has with any anchor of any level. DETRs have no
    anchors: these serve the mask alone, and a box marks cells on the levels that fit its size. The
    number of cells counts all levels and is averaged over processes.

    Args:
        place: as :class:`~projects.detr_distill.features.FeatureObjective` takes it.
        weight: factor of the loss.
        start_iteration: batches to train on before the loss is not zero.
        scales: sizes of the anchors in strides of their level.
        ratios: height to width of the anchors.
        threshold: the share of the best overlap.
        relu: whether a ReLU follows A. Then it cannot reach a teacher's negative values.
        legacy: whether boxes include the pixels at which they end, and the sides of anchors are
            rounded, as in the released code.
    """

    name = "fgfi"
    iteration: Tensor

    def __init__(
        self,
        place: Place = "neck",
        weight: float = 0.01,
        start_iteration: int = 400,
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        threshold: float = 0.5,
        relu: bool = False,
        legacy: bool = False,
    ):
        super().__init__(place, weight)
        self.start_iteration = start_iteration
        self.scales = tuple(scales)
        self.ratios = tuple(ratios)
        self.threshold = threshold
        self.relu = relu
        self.legacy = legacy
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))

    def make_adapters(self, student: list[int], teacher: list[int]) -> None:
        """Make A for every level."""
        self.adapters = adapt_channels(student, teacher, self._adapter)

    def _adapter(self, student: int, teacher: int) -> nn.Module:
        convolution = nn.Conv2d(student, teacher, 3, padding=1)
        return nn.Sequential(convolution, nn.ReLU()) if self.relu else convolution

    def forward(self, context: DistillationContext) -> dict[str, Tensor]:
        """The weighted loss; zero, with gradients of zero, in the first iterations."""
        student = [level.float() for level in self.maps(context.student)]
        teacher = [level.float() for level in self.maps(context.teacher)]
        with torch.autocast(student[0].device.type, enabled=False):
            loss = self.masked_loss(student, teacher, context) * self.weight
        started = self.iteration >= self.start_iteration
        self.iteration += 1
        return {f"loss_{self.name}": torch.where(started, loss, 0.0)}

    def masked_loss(
        self, student: list[Tensor], teacher: list[Tensor], context: DistillationContext
    ) -> Tensor:
        """The unweighted loss of the levels' maps (B, C, H, W)."""
        masks = self.masks(context, [(level.shape[2], level.shape[3]) for level in teacher])
        sums = [
            ((adapter(own) - wanted).square().sum(1) * mask).sum()
            for adapter, own, wanted, mask in zip(
                self.adapters, student, teacher, masks, strict=True
            )
        ]
        cells = torch.stack([mask.sum() for mask in masks]).sum()
        return torch.stack(sums).sum() / (2 * average_count(int(cells), cells.device))

    def masks(
        self, context: DistillationContext, shapes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Which cells of the levels are near objects: V masks (B, H, W)."""
        overlaps = []
        for shape in shapes:
            boxes, there = boxes_in_cells(context, shape)
            height, width = context.student.features.padded_size
            stride = width / shape[1], height / shape[0]
            if self.legacy:
                boxes = boxes + boxes.new_tensor([0, 0, 1 / stride[0], 1 / stride[1]])
            overlap = _best_overlap(boxes, self._anchors(*stride), shape)
            overlaps.append(overlap * there[..., None, None])
        best = torch.stack([overlap.amax((2, 3)) for overlap in overlaps]).amax(0)
        least = self.threshold * best[..., None, None]
        return [(overlap > least).any(1) for overlap in overlaps]

    def _anchors(self, across: float, down: float) -> list[tuple[float, float]]:
        """Width and height of every anchor in cells, which are so many pixels across and down."""
        anchors = []
        for ratio in self.ratios:
            width, height = ratio**-0.5, ratio**0.5
            if self.legacy:
                pixels = round(width * across)
                width, height = pixels / across, round(pixels * ratio) / down
            anchors += [(width * scale, height * scale) for scale in self.scales]
        return anchors


def _best_overlap(
    boxes: Tensor, anchors: list[tuple[float, float]], shape: tuple[int, int]
) -> Tensor:
    """IoU of boxes (B, G, 4) with that anchor of every cell which fits best, (B, G, H, W)."""
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[..., None, None]
    best = torch.zeros(*boxes.shape[:2], *shape, dtype=boxes.dtype, device=boxes.device)
    for width, height in anchors:  # one at a time: there is a number for each box and cell
        columns = _shared_length(boxes[..., 0::2], width, shape[1]).unsqueeze(-2)
        rows = _shared_length(boxes[..., 1::2], height, shape[0]).unsqueeze(-1)
        shared = rows * columns
        best = torch.maximum(best, shared / (areas + width * height - shared))
    return best


def _shared_length(spans: Tensor, side: float, length: int) -> Tensor:
    """What spans (B, G, 2) share with anchors of that side around every cell, (B, G, length)."""
    centers = torch.arange(length, dtype=spans.dtype, device=spans.device) + 0.5
    starts, ends = spans.unsqueeze(-1).unbind(-2)
    shared = torch.minimum(ends, centers + side / 2) - torch.maximum(starts, centers - side / 2)
    return shared.clamp(min=0)
