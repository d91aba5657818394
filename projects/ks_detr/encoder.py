"""The plug that turns any encoder into a knowledge-sharing one."""

from __future__ import annotations

from collections.abc import Sequence

from detectors.transformer import Encoder

from .attention import BranchName, ForegroundMark, ForegroundMLP, KnowledgeSharingAttention


def share_knowledge(
    encoder: Encoder,
    branches: Sequence[BranchName] = ("share_v", "share_a"),
    teacher_features: str = "smlp",
    teacher_aux_loss: bool = False,
    box_padding: int = 0,
) -> Encoder:
    """Give the last layer of ``encoder`` teacher branches; evaluation is left as it was.

    Args:
        encoder: changed in place.
        branches: ``share_v`` and ``share_a`` make the triple attention, one of them a dual one.
        teacher_features: ``smlp`` (Eq. 10) or ``mark`` (Eq. 9).
        teacher_aux_loss: see :class:`~projects.ks_detr.attention.KnowledgeSharingAttention`.
        box_padding: likewise.

    Returns:
        The same encoder.
    """
    makers = {"smlp": lambda: ForegroundMLP(encoder.embed_dim), "mark": ForegroundMark}
    if teacher_features not in makers:
        raise ValueError(f"teacher_features is {teacher_features!r}, expected 'smlp' or 'mark'")
    layer = encoder.layers[-1]
    layer.attentions[0] = KnowledgeSharingAttention(
        layer.attentions[0],
        makers[teacher_features](),
        tuple(branches),
        teacher_aux_loss,
        box_padding,
    )
    return encoder
