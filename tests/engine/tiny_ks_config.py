"""A LazyConfig that trains a small KS-Conditional-DETR on the tiny detector's data."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detrex.data import DetrDatasetMapper

from ...projects.ks_detr.configs.ks_conditional_detr_quickstart import model
from .tiny_config import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.num_classes = 3
model.num_queries = 5
model.transformer.encoder.encoder.num_layers = 2
model.transformer.decoder.num_layers = 2

dataloader.test.mapper = L(DetrDatasetMapper)(
    augmentation=[L(T.ResizeShortestEdge)(short_edge_length=48, max_size=80)],
    augmentation_with_crop=None,
    is_train=False,
)
dataloader.test.batch_size = 5
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
train.max_iter = 2
train.eval_period = 1
