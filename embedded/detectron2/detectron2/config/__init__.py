"""Configs that describe objects lazily: written in Python, changed by overrides, then built."""

from detectron2.config.instantiate import instantiate
from detectron2.config.lazy import LazyCall, LazyConfig

__all__ = ["LazyCall", "LazyConfig", "instantiate"]
