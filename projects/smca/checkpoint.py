"""From the released single-scale checkpoint's layout to ours."""

from __future__ import annotations

import re
from collections.abc import Callable

from detectron2.data import MetadataCatalog
from torch import Tensor

SPARSE_LOGITS = (91, 92)
"""Rows of a class head that are COCO's category ids, of which 80 are in use."""

_ENCODER_PARTS = {
    "self_attn": "attentions.0.attn",
    "linear1": "ffns.0.layers.0.0",
    "linear2": "ffns.0.layers.1",
    "norm1": "norms.0",
    "norm2": "norms.1",
}
_DECODER_PARTS = _ENCODER_PARTS | {
    "multihead_attn": "attentions.1.attn",
    "norm3": "norms.2",
    "norm4": "modulation.norm",
    "point2": "modulation.offsets",
    "point3": "modulation.scales",
}
_BLOCK_PARTS = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"} | {
    f"{kind}{number}": f"conv{number}{norm}"
    for number in (1, 2, 3)
    for kind, norm in (("conv", ""), ("bn", ".norm"))
}

_VALUES = r"(weight|bias)"
_LAYER = r"layers\.(\d+)\.(\w+)\.((?:in_proj_|out_proj\.)?(?:weight|bias))"
_RULES: tuple[tuple[str, Callable[[re.Match], str]], ...] = (
    (r"(?:class_embed|input_proj|bbox_embed\.layers\.\d)\.\w+|query_embed\.weight", re.Match.group),
    (r"backbone\.0\.body\.conv1\.weight", lambda m: "backbone.stem.conv1.weight"),
    (r"backbone\.0\.body\.bn1\.(\w+)", lambda m: f"backbone.stem.conv1.norm.{m[1]}"),
    (
        r"backbone\.0\.body\.layer(\d)\.(\d+)\.(downsample\.\d|\w+)\.(\w+)",
        lambda m: f"backbone.res{int(m[1]) + 1}.{m[2]}.{_BLOCK_PARTS[m[3]]}.{m[4]}",
    ),
    (
        rf"transformer\.encoder\.{_LAYER}",
        lambda m: f"transformer.encoder.layers.{m[1]}.{_ENCODER_PARTS[m[2]]}.{m[3]}",
    ),
    (
        rf"transformer\.decoder\.{_LAYER}",
        lambda m: f"transformer.decoder.layers.{m[1]}.{_DECODER_PARTS[m[2]]}.{m[3]}",
    ),
    (
        rf"transformer\.decoder\.layers\.0\.point1\.layers\.(\d)\.{_VALUES}",
        lambda m: f"transformer.decoder.center_head.layers.{m[1]}.{m[2]}",
    ),
    (
        rf"transformer\.decoder\.norm\.{_VALUES}",
        lambda m: f"transformer.decoder.post_norm_layer.{m[1]}",
    ),
)


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the released single-scale SMCA to this project's keys.

    Its class head has a logit for every number up to the largest of COCO's category ids, of which
    only those in use are kept.

    Args:
        state: what the released checkpoint holds under ``model``.

    Raises:
        ValueError: if there are keys that the released single-scale model does not have.
    """
    names = {key: _rename(key) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise ValueError(f"not of the released single-scale SMCA: {', '.join(unknown)}")
    converted = {name: state[key] for key, name in names.items() if name is not None}
    ids = sorted(MetadataCatalog.get("coco_2017_train").thing_dataset_id_to_contiguous_id)
    for key, value in converted.items():
        if key.startswith("class_embed.") and len(value) in SPARSE_LOGITS:
            converted[key] = value[ids]
    return converted


def _rename(key: str) -> str | None:
    """The key's name here, None if it is not understood."""
    for pattern, name in _RULES:
        match = re.fullmatch(pattern, key)
        if match:
            try:
                return name(match)
            except KeyError:  # a part that such layers do not have
                return None
    return None
