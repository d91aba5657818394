"""Data sets in COCO's format, and the builtin ones."""

from . import builtin as _builtin  # noqa: F401  (registers them)
from .coco import convert_to_coco_json, load_coco_json, register_coco_instances

__all__ = ["convert_to_coco_json", "load_coco_json", "register_coco_instances"]
