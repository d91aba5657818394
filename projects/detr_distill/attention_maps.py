"""Self- and cross-attention distillation (D3ETR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detectors.late_maps import LateMap
from detectors.lean import few_images
from detectors.structures import AttentionMaps
from engine.errors import UserError

from .context import DistillationContext, View
from .layerwise import Correspondence, LayerwiseObjective, QueryGroup

Divergence = Literal["kl", "reverse_kl", "mse"]
DIVERGENCES = ("kl", "reverse_kl", "mse")
SMALLEST = 1e-30
"""Probability in a logarithm; what is 0, as at padding, counts nothing."""

AT_A_TIME = 2**18
"""Weights of a map that are in use at once, unless one image has more: a megabyte. Fewer of them
take their time for being asked for, not for being many."""

Map = Tensor | LateMap
"""Attention weights (B, H, N, S), or what makes them."""


class AttentionDistillation(LayerwiseObjective):
    """The student's attention weights follow the teacher's, head by head and row by row.

    Per layer the mean over images, heads and rows of a divergence of the teacher's row t and the
    student's s, summed over the layers. Weights are taken before dropout; their heads are averaged
    if the two have different numbers of heads. Of each layer's weights nothing is kept for the
    backward pass, which makes them again.

    Args:
        group: see :class:`~projects.detr_distill.layerwise.LayerwiseObjective`.
        divergence: ``kl`` for ``sum(t log(t / s))``, ``reverse_kl`` for ``sum(s log(s / t))``,
            ``mse`` for the mean of ``(t - s) ** 2``.
        renormalise: let rows add up to 1 again after queries without a partner have been left out.
        average_heads: compare the mean of the heads.
        layers: see :class:`~projects.detr_distill.layerwise.LayerwiseObjective`.
        weight: factor of the loss.
    """

    needs_attention = True

    def __init__(
        self,
        group: QueryGroup = "adaptive",
        divergence: Divergence = "kl",
        renormalise: bool = True,
        average_heads: bool = False,
        layers: Sequence[int] | None = None,
        weight: float = 1.0,
    ):
        super().__init__(group, layers, weight)
        if divergence not in DIVERGENCES:
            expected = ", ".join(DIVERGENCES)
            raise UserError(f"divergence is {divergence!r}, expected one of {expected}")
        self.divergence: Divergence = divergence
        self.renormalise = renormalise
        self.average_heads = average_heads

    def maps(self, view: View) -> Sequence[Map]:
        """The attention weights of the L layers."""
        raise NotImplementedError

    def select(self, weights: Tensor, queries: Tensor) -> Tensor:
        """The weights of some queries (B, P) among (B, H, N, S)."""
        raise NotImplementedError

    def forward(self, context: DistillationContext) -> dict[str, Tensor]:
        """The weighted loss, summed over the layers."""
        student, teacher = self.maps(self.learner(context)), self.maps(context.teacher)
        stages = context.stages()
        losses = []
        for layer in self.chosen(context):
            maps = student[layer], teacher[stages[layer]]
            pairs = self.correspondence(context, layer)
            largest = max((made.shape for made in maps), key=torch.Size.numel)
            for rows in few_images(largest, AT_A_TIME):
                share = (rows.stop - rows.start) / len(context.targets)
                losses.append(self.recomputed_loss(*maps, pairs, rows) * share)
        return {self.loss_name(): torch.stack(losses).sum() * self.weight}

    def recomputed_loss(
        self, student: Map, teacher: Map, pairs: Correspondence, rows: slice
    ) -> Tensor:
        """:meth:`layer_loss`, of which the backward pass computes again what it needs."""
        return checkpoint(
            self.layer_loss,
            student,
            teacher,
            pairs,
            rows,
            use_reentrant=False,
            preserve_rng_state=False,
        )

    def layer_loss(self, student: Map, teacher: Map, pairs: Correspondence, rows: slice) -> Tensor:
        """The unweighted loss of a layer, the mean over some of the images."""
        with torch.no_grad():
            wanted = self._chosen_weights(teacher, pairs.teacher, rows)
        found = self._chosen_weights(student, pairs.student, rows)
        if self.average_heads or found.shape[1] != wanted.shape[1]:
            found, wanted = found.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
        return divergence(found, wanted, self.divergence)

    def _chosen_weights(self, made: Map, queries: Tensor | None, rows: slice) -> Tensor:
        weights = made(rows) if isinstance(made, LateMap) else made[rows]
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        return weights if queries is None else self.select(weights, queries[rows])


class SelfAttentionDistillation(AttentionDistillation):
    """What the student's queries attend to among one another is what the teacher's do."""

    kind = "self_attention"

    def maps(self, view: View) -> Sequence[Map]:
        """Weights (B, H, N, N) of the L layers."""
        return _attention_of(view).self_attention

    def select(self, weights: Tensor, queries: Tensor) -> Tensor:
        """Rows and columns of queries (B, P), (B, H, P, P), that add up to 1 if they are to."""
        rows = weights.take_along_dim(queries[:, None, :, None], dim=2)
        chosen = rows.take_along_dim(queries[:, None, None, :], dim=3)
        if not self.renormalise:
            return chosen
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=SMALLEST)


class CrossAttentionDistillation(AttentionDistillation):
    """What the student's queries attend to in the image is what the teacher's do.

    In deformable decoders these are the weights of the sampling points, a distribution over levels
    and points for every head, which both must have the same number of.
    """

    kind = "cross_attention"

    def prepare(self, student: View, teacher: View) -> None:
        """Check that both attend to the same cells, or with the same sampling points."""
        super().prepare(student, teacher)
        for name, view in (("student", student), ("teacher", teacher)):
            if not self._has_distributions(view):
                raise UserError(
                    f"CrossAttentionDistillation: the {name} is of type "
                    f"{type(view.detector).__name__}, whose cross-attention has no weights that "
                    "add up to 1"
                )
        self._check_places(student, teacher)

    def forward(self, context: DistillationContext) -> dict[str, Tensor]:
        """The weighted loss, summed over the layers."""
        self._check_places(context.student, context.teacher)
        return super().forward(context)

    def maps(self, view: View) -> Sequence[Map]:
        """Weights (B, H, N, S) of the L layers, or (B, H, N, V * P)."""
        attention = _attention_of(view)
        if attention.cross_attention:
            return attention.cross_attention
        return [weights.transpose(1, 2).flatten(3) for _, weights in attention.sampling]

    def select(self, weights: Tensor, queries: Tensor) -> Tensor:
        """Rows of queries (B, P): (B, H, P, S)."""
        return weights.take_along_dim(queries[:, None, :, None], dim=2)

    @staticmethod
    def _has_distributions(view: View) -> bool:
        """Whether a head's weights belong together; AdaMixer weighs each point by itself."""
        attention = _attention_of(view)
        return bool(attention.cross_attention) or all(
            (weights.sum((-2, -1)) - 1).abs().amax() < 0.01 for _, weights in attention.sampling
        )

    @staticmethod
    def _check_places(student: View, teacher: View) -> None:
        places, expected = _places(student), _places(teacher)
        if places != expected:
            raise UserError(
                f"CrossAttentionDistillation: the student attends to {places}, "
                f"the teacher to {expected}"
            )


def divergence(found: Tensor, wanted: Tensor, kind: Divergence) -> Tensor:
    """How far distributions (..., S) are from those that are wanted; the mean over the rest."""
    if kind == "mse":
        return (found - wanted).square().mean()
    if kind == "kl":
        return F.kl_div(found.clamp(min=SMALLEST).log(), wanted, reduction="none").sum(-1).mean()
    # the gradient of what is wanted is not finite at 0
    ratio = found.clamp(min=SMALLEST).log() - wanted.clamp(min=SMALLEST).log()
    return (found * ratio).sum(-1).mean()


def _attention_of(view: View) -> AttentionMaps:
    assert view.attention is not None  # needs_attention
    return view.attention


def _places(view: View) -> str:
    """What the cross-attention's weights belong to, in words."""
    attention = _attention_of(view)
    if attention.cross_attention:
        return f"maps of {view.memory.spatial_shapes} cells"
    heads, levels, points = attention.sampling[0][1].shape[2:]
    return f"samples of {heads} heads, {levels} levels, {points} points"
