"""How the detectors of a study are trained: alike, but for what a method changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from projects.detr_distill.configs.common.distill import distill, teacher

_QUICKSTART = Path(__file__).parent.parent / "baselines/configs/conditional_detr_quickstart.py"


def training(model: Any, iterations: int, *, branches: Sequence[str] = (), **settings: Any) -> Any:
    """The quickstart's training of another model and length.

    Args:
        model: config.
        iterations: the learning rate drops at three quarters of them.
        branches: those that evaluation looks at, the student first.
        settings: dotted keys with ``__`` for dots, such as ``train__amp__enabled=True``.

    Returns:
        A complete config.
    """
    config = LazyConfig.load(str(_QUICKSTART))
    config.model = model
    config.train.max_iter = iterations
    config.train.eval_period = config.train.checkpointer.period = max(iterations // 5, 1)
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    if branches:
        config.evaluation = {"branch": list(branches)}
    return config


def distillation(student: DictConfig, detector: DictConfig, objectives: list, **rest: Any) -> Any:
    """A training of a student under a teacher.

    Args:
        student: its model's config.
        detector: the teacher's.
        objectives: configs of what is distilled.
        rest: as of :func:`training`.
    """
    config = training(distill(student, detector, objectives), **rest)
    config.teacher = copy.deepcopy(teacher)
    return config
