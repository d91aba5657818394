"""Learning-rate schedules of every shape, each with a warm-up of ``warmup_steps``."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    ExponentialParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    StepParamScheduler,
    StepWithFixedGammaParamScheduler,
)


def _warmed_up(scheduler, warmup_steps, num_updates, warmup_method, warmup_factor):
    return L(WarmupParamScheduler)(
        scheduler=scheduler,
        warmup_length=warmup_steps / num_updates,
        warmup_method=warmup_method,
        warmup_factor=warmup_factor,
    )


def multistep_lr_scheduler(
    values=[1.0, 0.1],  # noqa: B006
    warmup_steps=0,
    num_updates=90000,
    milestones=[82500],  # noqa: B006
    warmup_method="linear",
    warmup_factor=0.001,
):
    """``values`` in turn, changing at ``milestones``; without ``num_updates`` the last one ends."""
    scheduler = L(MultiStepParamScheduler)(
        values=values, milestones=milestones, num_updates=num_updates
    )
    steps = milestones[-1] if num_updates is None else num_updates
    return _warmed_up(scheduler, warmup_steps, steps, warmup_method, warmup_factor)


def step_lr_scheduler(
    values, warmup_steps, num_updates, warmup_method="linear", warmup_factor=0.001
):
    """``values`` in turn, for equally long."""
    scheduler = L(StepParamScheduler)(values=values, num_updates=num_updates)
    return _warmed_up(scheduler, warmup_steps, num_updates, warmup_method, warmup_factor)


def step_lr_scheduler_with_fixed_gamma(
    base_value,
    num_decays,
    gamma,
    num_updates,
    warmup_steps,
    warmup_method="linear",
    warmup_factor=0.001,
):
    """``base_value``, multiplied by ``gamma`` at ``num_decays`` equally spaced steps."""
    scheduler = L(StepWithFixedGammaParamScheduler)(
        base_value=base_value, num_decays=num_decays, gamma=gamma, num_updates=num_updates
    )
    return _warmed_up(scheduler, warmup_steps, num_updates, warmup_method, warmup_factor)


def cosine_lr_scheduler(
    start_value, end_value, num_updates, warmup_steps, warmup_method="linear", warmup_factor=0.001
):
    """Half a cosine from ``start_value`` to ``end_value``."""
    scheduler = L(CosineParamScheduler)(start_value=start_value, end_value=end_value)
    return _warmed_up(scheduler, warmup_steps, num_updates, warmup_method, warmup_factor)


def linear_lr_scheduler(
    start_value, end_value, num_updates, warmup_steps, warmup_method="linear", warmup_factor=0.001
):
    """Straight line from ``start_value`` to ``end_value``."""
    scheduler = L(LinearParamScheduler)(start_value=start_value, end_value=end_value)
    return _warmed_up(scheduler, warmup_steps, num_updates, warmup_method, warmup_factor)


def constant_lr_scheduler(
    value, num_updates, warmup_steps, warmup_method="linear", warmup_factor=0.001
):
    """Always ``value``."""
    scheduler = L(ConstantParamScheduler)(value=value)
    return _warmed_up(scheduler, warmup_steps, num_updates, warmup_method, warmup_factor)


def exponential_lr_scheduler(
    start_value, decay, num_updates, warmup_steps, warmup_method="linear", warmup_factor=0.001
):
    """From ``start_value`` down to ``decay`` times that, exponentially."""
    scheduler = L(ExponentialParamScheduler)(start_value=start_value, decay=decay)
    return _warmed_up(scheduler, warmup_steps, num_updates, warmup_method, warmup_factor)
