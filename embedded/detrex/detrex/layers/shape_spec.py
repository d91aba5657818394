"""What a module promises about the shape of a feature map."""

from detectron2.layers import ShapeSpec as _ShapeSpec

__all__ = ["ShapeSpec"]


class ShapeSpec(_ShapeSpec):
    """detectron2's class of this name."""
