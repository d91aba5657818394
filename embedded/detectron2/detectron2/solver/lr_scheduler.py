"""Learning-rate schedules on top of fvcore's parameter schedulers."""

from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["LRMultiplier", "WarmupParamScheduler"]


class WarmupParamScheduler(CompositeParamScheduler):
    """Puts a warm-up in front of another scheduler."""

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ):
        """Combine the warm-up with ``scheduler``.

        Args:
            scheduler: what follows the warm-up.
            warmup_factor: the warm-up starts at this multiple of the scheduler's first value.
            warmup_length: share of the training that is warm-up, in [0, 1].
            warmup_method: ``"linear"`` or ``"constant"``.
            rescale_interval: whether the whole of ``scheduler`` is squeezed into the time after
                the warm-up; otherwise the warm-up hides its beginning.
        """
        start = warmup_factor * scheduler(0.0)
        if warmup_method == "linear":
            end = scheduler(0.0 if rescale_interval else warmup_length)
            warmup: ParamScheduler = LinearParamScheduler(start, end)
        elif warmup_method == "constant":
            warmup = ConstantParamScheduler(start)
        else:
            raise ValueError(f"warmup_method is '{warmup_method}', expected 'linear' or 'constant'")
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Multiplies every group's initial learning rate by a common factor of training progress."""

    def __init__(
        self,
        optimizer: Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ):
        """Start the schedule.

        Args:
            optimizer: its learning rates are changed.
            multiplier: factor as a function of progress in [0, 1].
            max_iter: number of iterations of the whole training.
            last_iter: last finished iteration; -1 at the start.
        """
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(
                f"multiplier is a {type(multiplier).__name__}, expected an fvcore ParamScheduler"
            )
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict[str, Any]:
        """Return the initial learning rates and the iteration; the multiplier has no state."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of every group at the current iteration."""
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base * factor for base in self.base_lrs]
