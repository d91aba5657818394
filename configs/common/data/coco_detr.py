"""detrex's COCO data for DETR, with training batches that can be resumed exactly."""

from detrex.config import get_config

from engine.data import build_resumable_train_loader

dataloader = get_config("common/data/coco_detr.py").dataloader
dataloader.train._target_ = build_resumable_train_loader
