"""The plug that turns any encoder into a knowledge-sharing one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from detectors.attention import SelfAttention
from detectors.deformable_attention import DeformableSelfAttention
from detectors.feed_forward import checkpoint_feedforward
from detectors.transformer import Encoder

from .attention import KnowledgeSharingAttention
from .deformable_attention import KnowledgeSharingDeformableAttention
from .foreground import Interpolation
from .teacher import BRANCH_NAMES, BranchName, ForegroundMark, ForegroundMLP

_SHARING: dict[type, Callable[..., nn.Module]] = {
    SelfAttention: KnowledgeSharingAttention,
    DeformableSelfAttention: KnowledgeSharingDeformableAttention,
}


def share_knowledge(
    encoder: Encoder,
    branches: Sequence[BranchName] = BRANCH_NAMES,
    teacher_features: str = "smlp",
    teacher_aux_loss: bool = False,
    box_padding: int = 0,
    *,
    interpolation: Interpolation = "bilinear",
    layers: int | Sequence[int] = 1,
    branch_loss_weights: Mapping[str, float] | None = None,
    keep_hidden: bool = False,
) -> Encoder:
    """Give layers of ``encoder`` teacher branches; evaluation is left as it was.

    The paper has them in the last layer. Of several layers, the first makes the branches of the
    student's tokens. From there on every branch goes through all layers. In another sharing layer
    its own tokens make its teacher features and its residual, and the student's tokens what it
    shares: V in ``share_v``, A in ``share_a``. The student never sees a teacher. Each layer has
    teacher parameters of its own.

    Args:
        encoder: changed in place.
        branches: ``share_v`` and ``share_a`` make the triple attention, one of them a dual one.
        teacher_features: ``smlp`` (Eq. 10) or ``mark`` (Eq. 9).
        teacher_aux_loss: see :class:`~projects.ks_detr.teacher.Teacher`.
        box_padding: likewise.
        interpolation: likewise.
        layers: how many of the last layers share knowledge, or the indices of those that do.
        branch_loss_weights: factors of the teachers' losses, by branch.
        keep_hidden: keep what the feed-forward networks of these layers have inside for the
            backward pass, which takes most of the branches' memory here; else it is computed again.

    Returns:
        The same encoder.
    """
    if teacher_features not in ("smlp", "mark"):
        raise ValueError(f"teacher_features is {teacher_features!r}, expected 'smlp' or 'mark'")
    if not isinstance(encoder, Encoder):
        raise TypeError(
            f"{type(encoder).__name__} is no Encoder, whose layers could share knowledge"
        )
    attentions = [layer.get_submodule("attentions") for layer in encoder.layers]
    indices = _indices(layers, len(attentions))
    chosen = [attentions[index] for index in indices]
    for student in [one.get_submodule("0") for one in chosen]:
        if type(student) not in _SHARING:
            raise TypeError(
                f"an encoder layer has {type(student).__name__}, knowledge is shared with a plain "
                "SelfAttention or DeformableSelfAttention"
            )
    if any(hasattr(one.get_submodule("0"), "teacher") for one in attentions):
        raise TypeError("the encoder shares knowledge already, name all its layers at once")
    for one in chosen:
        student = one.get_submodule("0")
        mark = teacher_features == "mark"
        sharing = _SHARING[type(student)](
            student,
            ForegroundMark() if mark else ForegroundMLP(encoder.embed_dim),
            branches,
            aux_loss=teacher_aux_loss,
            loss_weights=branch_loss_weights,
            box_padding=box_padding,
            interpolation=interpolation,
        )
        sharing.to(next(student.parameters()))  # where the student is
        one.register_module("0", sharing.train(student.training))
    if not (keep_hidden or encoder.checkpoint_layers):  # which keeps nothing inside layers anyway
        checkpoint_feedforward(nn.ModuleList(encoder.layers[index] for index in indices))
    return encoder


def _indices(layers: int | Sequence[int], count: int) -> list[int]:
    """Of the layers that share knowledge, in order."""
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise ValueError(f"layers is {layers}, the encoder has {count}")
        return list(range(count - layers, count))
    wrong = [index for index in layers if not -count <= index < count]
    if wrong or not layers:
        raise ValueError(f"layers is {list(layers)}, the encoder has {count}")
    return sorted({index % count for index in layers})
