"""A data set of one's own, treated as COCO; register it as my_dataset_train and _test."""

from .coco_detr import dataloader

dataloader.train.dataset.names = "my_dataset_train"
dataloader.test.dataset.names = "my_dataset_test"
