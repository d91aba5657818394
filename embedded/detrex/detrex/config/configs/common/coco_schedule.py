"""Learning-rate schedules on COCO, counted in epochs or in units ("1x") of 90000 steps of 16."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

_STEPS_PER_EPOCH = 7500
_STEPS_PER_X = 90000


def _multistep(values, milestones, warmup_length):
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=values, milestones=milestones),
        warmup_length=warmup_length,
        warmup_method="linear",
        warmup_factor=0.001,
    )


def default_X_scheduler(num_X):
    """Schedule of ``num_X`` times 90000 steps with two drops and 1000 steps of warm-up."""
    steps = num_X * _STEPS_PER_X
    # Short schedules drop at the same fractions, and only the fractions count, so those of 2x
    # are written as those of 1x. Longer ones drop 60000 and 20000 steps before the end.
    end = _STEPS_PER_X if num_X <= 2 else steps
    first, second = (60000, 80000) if num_X <= 2 else (end - 60000, end - 20000)
    return _multistep([1.0, 0.1, 0.01], [first, second, end], 1000 / steps)


def default_coco_scheduler(epochs=50, decay_epochs=40, warmup_epochs=0):
    """Schedule with one drop after ``decay_epochs``."""
    steps, drop, warmup = (n * _STEPS_PER_EPOCH for n in (epochs, decay_epochs, warmup_epochs))
    return _multistep([1.0, 0.1], [drop, steps], warmup / steps)


lr_multiplier_1x = default_X_scheduler(1)
lr_multiplier_2x = default_X_scheduler(2)
lr_multiplier_3x = default_X_scheduler(3)
lr_multiplier_6x = default_X_scheduler(6)
lr_multiplier_9x = default_X_scheduler(9)

lr_multiplier_50ep = default_coco_scheduler(50, 40)
lr_multiplier_36ep = default_coco_scheduler(36, 30)
lr_multiplier_24ep = default_coco_scheduler(24, 20)
lr_multiplier_12ep = default_coco_scheduler(12, 11)

lr_multiplier_50ep_warmup = default_coco_scheduler(50, 40, 1e-3)
lr_multiplier_12ep_warmup = default_coco_scheduler(12, 11, 1e-3)
