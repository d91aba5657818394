"""The part of detectron2's public API that this project uses, written for it from scratch."""

__version__ = "0.6"
