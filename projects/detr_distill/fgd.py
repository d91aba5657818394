"""FGD: foreground and background apart, weighted by the teacher's attention; global relations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .context import DistillationContext
from .features import FeatureObjective, Place, adapt_channels
from .regions import activation_attention, boxes_in_cells


class FGD(FeatureObjective):
    """Focal and global distillation, with a 1 x 1 convolution A where numbers of channels differ.

    With ``D = sum over channels of (A(F_S) - F_T)^2``, weighted by the teacher's attention to cells
    and channels, the parts are D on the foreground, where every box counts alike; D on the
    background, every image's mean; the distance of the two attentions; and that of the two maps
    after a :class:`GlobalContext` each. Sums are divided by B.

    Args:
        place: as :class:`~projects.detr_distill.features.FeatureObjective` takes it.
        weight: factor of all parts.
        foreground: factor of its part, as the next three; the defaults are the released code's for
            one-stage detectors. For two-stage ones they are 5e-5, 2.5e-5, 5e-5 and 5e-7.
        background: of the cells that no box covers.
        attention: of the attentions.
        relation: of the relations.
        temperature: of the attentions.
        padded: scale boxes with the padded batch, which the maps span. The released code takes
            every image's own size.
    """

    name = "fgd"
    parts = ("foreground", "background", "attention", "relation")

    def __init__(
        self,
        place: Place = "neck",
        weight: float = 1.0,
        foreground: float = 1e-3,
        background: float = 5e-4,
        attention: float = 5e-4,
        relation: float = 5e-6,
        temperature: float = 0.5,
        padded: bool = True,
    ):
        super().__init__(place, weight)
        self.factors = (foreground, background, attention, relation)
        self.temperature = temperature
        self.padded = padded

    def make_adapters(self, student: list[int], teacher: list[int]) -> None:
        """Make A and both global contexts for every level."""
        self.adapters = adapt_channels(student, teacher)
        self.student_contexts = nn.ModuleList(map(GlobalContext, teacher))
        self.teacher_contexts = nn.ModuleList(map(GlobalContext, teacher))

    def level_loss(
        self, level: int, student: Tensor, teacher: Tensor, context: DistillationContext
    ) -> Tensor:
        """The four parts times their factors, (4,)."""
        student = self.adapters[level](student)
        cells, channels = activation_attention(teacher, self.temperature)
        own_cells, own_channels = activation_attention(student, self.temperature)
        difference = (student - teacher).square() * channels[..., None, None]
        difference = difference.sum(1) * cells
        shape = (teacher.shape[2], teacher.shape[3])
        foreground, background = box_masks(*boxes_in_cells(context, shape, self.padded), shape)
        relation = self.student_contexts[level](student) - self.teacher_contexts[level](teacher)
        parts = (
            (difference * foreground).sum(),
            (difference * background).sum(),
            (own_cells - cells).abs().sum() + (own_channels - channels).abs().sum(),
            relation.square().sum(),
        )
        return torch.stack(
            [factor * part for factor, part in zip(self.factors, parts, strict=True)]
        ) / len(teacher)


def box_masks(boxes: Tensor, there: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """FGD's masks, which give every box, and the background of every image, the same weight.

    A box covers all cells from where it starts to where it ends, both inclusive. It counts by the
    inverse of their number, also of those outside the map; where boxes overlap, the smallest does.

    Args:
        boxes: (B, G, 4) xyxy in cells.
        there: (B, G), which of them exist.
        shape: (h, w) of the map.

    Returns:
        Foreground and background (B, H, W).
    """
    starts, ends = boxes[..., :2].floor(), boxes[..., 2:].ceil()
    columns, rows = (
        _between(starts[..., axis], ends[..., axis], shape[1 - axis]) for axis in (0, 1)
    )
    covered = rows.unsqueeze(-1) & columns.unsqueeze(-2) & there[..., None, None]
    weights = 1 / (ends - starts + 1).prod(-1)
    foreground = (covered * weights[..., None, None]).amax(1)
    free = (~covered.any(1)).to(boxes.dtype)
    return foreground, free / free.sum((1, 2), keepdim=True).clamp(min=1)


def _between(starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """Which of the first cells of an axis lie in the intervals (B, G): (B, G, length)."""
    cells = torch.arange(length, device=starts.device)
    return (starts.unsqueeze(-1) <= cells) & (cells <= ends.unsqueeze(-1))


class GlobalContext(nn.Module):
    """``F + W2 ReLU(LN(W1 c))`` with c the mean of F under one attention map; at first F itself.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attention = nn.Conv2d(channels, 1, 1)
        last = nn.Linear(hidden, channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), last
        )

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, C, H, W) with what the whole map says added to every cell."""
        attention = self.attention(features).flatten(2).softmax(-1)  # (B, 1, S)
        context = (features.flatten(2) @ attention.mT).squeeze(-1)
        return features + self.transform(context)[..., None, None]
