"""The part of detrex's public API that this project uses, written for it from scratch."""

__version__ = "0.3.0"
