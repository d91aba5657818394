"""Schedules in fractions of ``train.max_iter``, so that a run of any length has the same shape."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

drop_at_three_quarters = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[75], num_updates=100),
    warmup_factor=0.01,
    warmup_length=0.03,
    warmup_method="linear",
)
