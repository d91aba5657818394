"""What a module promises about the shape of a feature map."""

from dataclasses import dataclass

__all__ = ["ShapeSpec"]


@dataclass
class ShapeSpec:
    """Shape of a feature map as far as it is known before any input is seen."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
