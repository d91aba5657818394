"""A LazyConfig that trains the tiny detector; the folder of its data comes from TINY_DATA."""

import os

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from tiny_detector import TinyDetector

from engine.data import build_resumable_train_loader
from engine.defaults import TRAIN_DEFAULTS

folder = os.environ["TINY_DATA"]
if "tiny_train" not in DatasetCatalog:
    register_coco_instances("tiny_train", {}, f"{folder}/instances.json", folder)

model = L(TinyDetector)()

dataloader = OmegaConf.create({})
dataloader.train = L(build_resumable_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="tiny_train"),
    mapper=L(DatasetMapper)(is_train=True, augmentations=[L(T.RandomFlip)()], image_format="RGB"),
    total_batch_size=4,
    num_workers=0,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="tiny_train", filter_empty=False),
    mapper=L(DatasetMapper)(
        is_train=False, augmentations=[], image_format="${...train.mapper.image_format}"
    ),
    num_workers=0,
)
dataloader.evaluator = L(COCOEvaluator)(dataset_name="${..test.dataset.names}")

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=1e-3, weight_decay=1e-4
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[7], num_updates=10),
    warmup_length=0.1,
    warmup_factor=0.1,
)

train = OmegaConf.merge(
    {
        "output_dir": "",
        "init_checkpoint": "",
        "max_iter": 12,
        "ddp": {"broadcast_buffers": False},
        "clip_grad": {"enabled": True, "params": {"max_norm": 0.5, "norm_type": 2}},
        "checkpointer": {"period": 3, "max_to_keep": 2},
        "eval_period": 6,
        "log_period": 1,
        "model_ema": {
            "enabled": False,
            "decay": 0.9,
            "device": "",
            "use_ema_weights_for_eval_only": False,
        },
    },
    TRAIN_DEFAULTS,
    {"device": "cpu", "seed": 7},
)
