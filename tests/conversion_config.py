"""A complete config with a tiny Conditional DETR, of the size of the recorded official one."""

from conversion_cases import tiny_config
from detectron2.config import LazyConfig
from tiny_detectors import ROOT

_base = LazyConfig.load(str(ROOT / "projects/baselines/configs/conditional_detr_r50_50ep.py"))
dataloader, optimizer = _base.dataloader, _base.optimizer
lr_multiplier, train = _base.lr_multiplier, _base.train
model = tiny_config("conditional_detr_r50_50ep")
