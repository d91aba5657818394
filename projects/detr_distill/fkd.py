"""FKD: attention-guided and non-local distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional as F

from .context import DistillationContext
from .features import FeatureObjective, Place, adapt_channels, pointwise
from .regions import activation_attention


class FKD(FeatureObjective):
    """Euclidean distances over the whole batch, which grow with the root of its size.

    The parts are the distance of the maps, masked by the attention of both detectors to cells and
    channels; of the channels' means; of the cells' means; and of the maps after a
    :class:`NonLocal` each. Each has an adapter on the student's side.

    Args:
        place: as :class:`~projects.detr_distill.features.FeatureObjective` takes it.
        weight: factor of all parts; 6 for one-stage detectors.
        masked: factor of its part, as the next three; the defaults are those of two-stage
            detectors.
        channel: of the channels' means.
        spatial: of the cells' means.
        non_local: of the maps with what non-local cells add.
        temperature: of the attentions.
        pools: cells, along an axis, that are pooled into one key, on the finest levels; 2 on those
            that follow.
        inner_channels: of the non-local keys on the finest levels; half the map's on those that
            follow.
    """

    name = "fkd"
    parts = ("masked", "channel", "spatial", "non_local")

    def __init__(
        self,
        place: Place = "neck",
        weight: float = 1.0,
        masked: float = 7e-5,
        channel: float = 4e-3,
        spatial: float = 4e-3,
        non_local: float = 7e-5,
        temperature: float = 0.1,
        pools: Sequence[int] = (8, 4),
        inner_channels: int = 64,
    ):
        super().__init__(place, weight)
        self.factors = (masked, channel, spatial, non_local)
        self.temperature = temperature
        self.pools = tuple(pools)
        self.inner_channels = inner_channels

    def make_adapters(self, student: list[int], teacher: list[int]) -> None:
        """Make the adapters and both non-local blocks for every level."""
        self.adapters = adapt_channels(student, teacher, pointwise)
        self.channel_adapters = adapt_channels(student, teacher, nn.Linear)
        self.spatial_adapters = adapt_channels(
            student, teacher, lambda *_: nn.Conv2d(1, 1, 3, padding=1)
        )
        self.non_local_adapters = adapt_channels(student, teacher, pointwise)
        self.student_blocks = self._blocks(student)
        self.teacher_blocks = self._blocks(teacher)

    def _blocks(self, channels: list[int]) -> nn.ModuleList:
        finest = len(self.pools)
        return nn.ModuleList(
            NonLocal(count, self.inner_channels, self.pools[level])
            if level < finest
            else NonLocal(count, max(count // 2, 1), 2)
            for level, count in enumerate(channels)
        )

    def level_loss(
        self, level: int, student: Tensor, teacher: Tensor, context: DistillationContext
    ) -> Tensor:
        """The four parts times their factors, (4,)."""
        adapted = self.adapters[level](student)
        channels = self.channel_adapters[level](student.mean((2, 3)))
        cells = self.spatial_adapters[level](student.mean(1, keepdim=True))
        blended = self.non_local_adapters[level](self.student_blocks[level](student))
        parts = (
            vector_norm((adapted - teacher) * self._mask(student, adapted, teacher).sqrt()),
            vector_norm(channels - teacher.mean((2, 3))),
            vector_norm(cells - teacher.mean(1, keepdim=True)),
            vector_norm(blended - self.teacher_blocks[level](teacher)),
        )
        return torch.stack(
            [factor * part for factor, part in zip(self.factors, parts, strict=True)]
        )

    @torch.no_grad()
    def _mask(self, student: Tensor, adapted: Tensor, teacher: Tensor) -> Tensor:
        """Product of the attentions to cells and channels, each averaged over both, (B, C, H, W).

        Where the student's channels are not the teacher's, the adapted ones are looked at.
        """
        seen = student if student.shape == teacher.shape else adapted
        cells, channels = activation_attention(teacher, self.temperature)
        own_cells, own_channels = activation_attention(seen, self.temperature)
        return (cells + own_cells)[:, None] * (channels + own_channels)[..., None, None] / 4


class NonLocal(nn.Module):
    """``F + BN(W y)``, where y is the values' mean under products of queries and keys, no softmax.

    Keys and values are pooled. The block starts as the identity.

    Args:
        channels: C.
        inner_channels: of queries, keys and values.
        pool: cells, along an axis, that become one key; fewer on maps that are smaller.
    """

    def __init__(self, channels: int, inner_channels: int, pool: int):
        super().__init__()
        self.pool = pool
        self.query = nn.Conv2d(channels, inner_channels, 1)
        self.key = nn.Conv2d(channels, inner_channels, 1)
        self.value = nn.Conv2d(channels, inner_channels, 1)
        self.output = nn.Conv2d(inner_channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, C, H, W) with what all cells add to every cell."""
        shape = features.shape[2:]
        pool = [min(self.pool, length) for length in shape]
        keys = F.max_pool2d(self.key(features), pool).flatten(2)
        values = F.max_pool2d(self.value(features), pool).flatten(2)
        queries = self.query(features).flatten(2)
        # without a softmax the products can be taken in the order that makes no S x S matrix
        mixed = (values @ keys.mT / keys.shape[-1]) @ queries
        return features + self._normalize(self.output(mixed.unflatten(2, shape)))

    def _normalize(self, values: Tensor) -> Tensor:
        """Batch normalisation; a single cell has no variance, and the running statistics serve."""
        norm = self.norm
        if values.numel() > values.shape[1]:
            return norm(values)
        statistics = norm.running_mean, norm.running_var
        return F.batch_norm(values, *statistics, norm.weight, norm.bias, eps=norm.eps)
