"""Optimiser parameter groups and learning-rate schedules."""

from detectron2.solver.build import get_default_optimizer_params
from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler

__all__ = ["LRMultiplier", "WarmupParamScheduler", "get_default_optimizer_params"]
