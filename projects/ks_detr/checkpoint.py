"""Between checkpoints of KS-DETR's release, ours, and the plain detector's."""

from __future__ import annotations

import re

from torch import Tensor

_PACKED = re.compile(r"(.*\.attentions\.0\.)attn\.(in_proj_(?:weight|bias))")
_RELEASED_MLP = "ksgt.smlp_module.token_split_conv.linear.0."


def plain_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what exists in training only: the rest is the plain detector's checkpoint."""
    return {key: value for key, value in state.items() if ".attentions.0.teacher." not in key}


def from_released(state: dict[str, Tensor], prefix: str = "transformer.encoder.") -> dict:
    """Rename a state dict of the released KS-DETR (dense attention) to this project's keys.

    The release packs the teacher's projections below the student's in one ``in_proj`` matrix and
    keeps the sMLP beside the transformer.

    Args:
        state: the released keys.
        prefix: where the encoder lives in ``state``.
    """
    layers = [
        int(m.group(1))
        for m in map(re.compile(rf"{re.escape(prefix)}layers\.(\d+)\.").match, state)
        if m
    ]
    teacher = f"{prefix}layers.{max(layers)}.attentions.0.teacher."
    converted = {}
    for key, value in state.items():
        packed = _PACKED.fullmatch(key)
        if key.startswith(_RELEASED_MLP):
            converted[teacher + "features.linear." + key[len(_RELEASED_MLP) :]] = value
        elif packed and key.startswith(teacher.removesuffix("teacher.")):
            student_rows = 3 * state[f"{packed.group(1)}attn.out_proj.weight"].shape[0]
            converted[key] = value[:student_rows]
            converted[f"{packed.group(1)}teacher.{packed.group(2)}"] = value[student_rows:]
        else:
            converted[key] = value
    return converted
