"""Between checkpoints of KS-DETR's release, ours, and the plain detector's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from detectors.conversion.detrex import DETREX
from detectors.conversion.layout import Layout

_SHARING = re.compile(
    r"(?P<attention>.*\.attentions\.0\.)"
    r"(?:attn\.(?P<packed>in_proj_(?:weight|bias))"
    r"|(?P<teacher>attention_weights|value_proj)_teacher\.(?P<kind>weight|bias))"
)
_RELEASED_MLP = "ksgt.smlp_module.token_split_conv.linear.0."


def plain_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what exists in training only: the rest is the plain detector's checkpoint."""
    return {key: value for key, value in state.items() if not KS_DETR.for_training(key)}


def from_released(
    state: Mapping[str, Tensor], prefix: str = "transformer.encoder."
) -> dict[str, Tensor]:
    """Rename a state dict of the released KS-DETR to this project's keys.

    The release packs the projections of a dense teacher below the student's in one ``in_proj``
    matrix, keeps those of a deformable one beside the student's, and the sMLP beside the
    transformer.

    Args:
        state: the released keys.
        prefix: where the encoder lives in ``state``.
    """
    layers = [
        int(m.group(1))
        for m in map(re.compile(rf"{re.escape(prefix)}layers\.(\d+)\.").match, state)
        if m
    ]
    teacher = f"{prefix}layers.{max(layers, default=0)}.attentions.0.teacher."
    converted = {}
    for key, value in state.items():
        found = _SHARING.fullmatch(key) if key.startswith(prefix) else None
        if key.startswith(_RELEASED_MLP):
            converted[f"{teacher}features.linear.{key[len(_RELEASED_MLP) :]}"] = value
        elif found and found["packed"]:
            width = state.get(f"{found['attention']}attn.out_proj.weight")
            student = len(value) if width is None else 3 * len(width)
            converted[key] = value[:student]
            if len(value) > student:
                converted[f"{found['attention']}teacher.{found['packed']}"] = value[student:]
        elif found:
            name = f"{found['teacher']}.{found['kind']}"
            converted[f"{found['attention']}teacher.{name}"] = value
        else:
            converted[key] = value
    return converted


KS_DETR = Layout(
    name="ks-detr",
    origin="edocanonymous/KS-DETR",
    has=(r"ksgt\.smlp_module\..+",),
    unpack=from_released,
    rules=DETREX.rules,
    training_only=(r".+\.attentions\.0\.teacher\..+",),
)
