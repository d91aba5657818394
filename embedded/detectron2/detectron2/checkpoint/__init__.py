"""Saving and loading of model weights and training state."""

from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

from detectron2.checkpoint.detection_checkpoint import DetectionCheckpointer

__all__ = ["Checkpointer", "DetectionCheckpointer", "PeriodicCheckpointer"]
