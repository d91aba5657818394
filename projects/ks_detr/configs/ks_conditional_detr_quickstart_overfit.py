"""Does the whole chain learn? Memorise the few images of a small COCO (tools/subset_coco.py)."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from .ks_conditional_detr_quickstart import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

dataloader.train.dataset.names = "coco_2017_train"
dataloader.test.dataset.names = "coco_2017_train"
for _loader in (dataloader.train, dataloader.test):
    _loader.mapper.augmentation = [L(T.ResizeShortestEdge)(short_edge_length=192, max_size=320)]
dataloader.train.total_batch_size = 8
dataloader.test.batch_size = 8

model.num_classes = 80
model.num_queries = 60
model.transformer.decoder.mask_padding_in_training = False  # as in the run of docs/real_images.md

train.output_dir = "./output/quickstart_overfit"
train.max_iter = 800
