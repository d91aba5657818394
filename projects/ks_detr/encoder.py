"""The plug that turns any encoder into a knowledge-sharing one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from detectors.attention import SelfAttention
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
    features: nn.Module
    if teacher_features == "smlp":
        features = ForegroundMLP(encoder.embed_dim)
    elif teacher_features == "mark":
        features = ForegroundMark()
    else:
        raise ValueError(f"teacher_features is {teacher_features!r}, expected 'smlp' or 'mark'")
    attentions = encoder.layers[-1].get_submodule("attentions")
    student = attentions.get_submodule("0")
    if not isinstance(student, SelfAttention) or isinstance(student, KnowledgeSharingAttention):
        raise TypeError(
            f"the last encoder layer has {type(student).__name__}, "
            "knowledge is shared with a plain SelfAttention"
        )
    teaching = KnowledgeSharingAttention(
        student, features, tuple(branches), teacher_aux_loss, box_padding
    )
    attentions.register_module("0", teaching)
    return encoder
