"""Detectors of a study's two sizes, from the configs that users train."""

from __future__ import annotations

import copy
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from projects.baselines.configs.models.resnet import small_resnet

_PROJECTS = Path(__file__).resolve().parent.parent
_CHANNELS = {"res2": 64, "res3": 128, "res4": 256, "res5": 512}
"""Of the stages of ResNet-18 and ResNet-34."""


def small(family: str, classes: int) -> DictConfig:
    """The quickstart's model: 1 to 6 M parameters, strides up to 16 (multi-scale: 32).

    Args:
        family: such as "conditional_detr".
        classes: kinds of objects.
    """
    model = _load(f"{family}_quickstart")
    model.num_classes = classes
    return model


def medium(family: str, classes: int, depth: int = 18) -> DictConfig:
    """The full-size model on a small ResNet with trained batch norms, and 100 queries.

    Args:
        family: such as "conditional_detr".
        classes: kinds of objects.
        depth: of the ResNet, 18 or 34.
    """
    model = _load(f"{family}_r50")
    stages = list(model.backbone.out_features)
    model.backbone = small_resnet(depth)
    model.backbone.update(out_features=stages, freeze_at=0)
    model.backbone.stem.norm = model.backbone.stages.norm = "BN"
    if "in_channels" in model:
        model.in_channels = _CHANNELS["res5"]
    elif "in_channels" in model.neck:
        model.neck.in_channels = [_CHANNELS[name] for name in model.neck.in_features]
    else:
        for name, shape in model.neck.input_shapes.items():
            shape.channels = _CHANNELS[name]
    model.update(num_queries=100, num_classes=classes, select_box_nums_for_evaluation=100)
    if family == "detr":  # SMCA's baseline, whose losses are those of the others
        model.criterion = _load("conditional_detr_r50").criterion
    return model


def _load(name: str) -> DictConfig:
    project = "smca" if name.startswith("smca") else "baselines"
    config = LazyConfig.load(str(_PROJECTS / project / "configs/models" / f"{name}.py"))
    return copy.deepcopy(config.model)
