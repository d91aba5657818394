"""A ResNet's names: torchvision's to detectron2's."""

from __future__ import annotations

from .layout import first_match, modules

_BLOCKS = {
    **{f"conv{index}": f"conv{index}" for index in range(1, 4)},
    **{f"bn{index}": f"conv{index}.norm" for index in range(1, 4)},
    r"downsample\.0": "shortcut",
    r"downsample\.1": "shortcut.norm",
}

_RULES = modules(
    {
        r"backbone\.body\.conv1": "backbone.stem.conv1",
        r"backbone\.body\.bn1": "backbone.stem.conv1.norm",
        **{
            rf"backbone\.body\.layer{stage}\.(\d+)\.{theirs}": rf"backbone.res{stage + 1}.\1.{ours}"
            for stage in range(1, 5)
            for theirs, ours in _BLOCKS.items()
        },
    }
)


def to_detectron2(key: str) -> str:
    """detectron2's name of a weight below ``backbone.body``; others stay as they are."""
    target = first_match(key, _RULES)
    return key if target is None or target.key is None else target.key
