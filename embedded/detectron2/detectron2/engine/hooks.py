"""The standard hooks: timing, learning rate, evaluation, checkpoints and writers."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim.lr_scheduler import LRScheduler as _TorchScheduler

from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from .train_loop import HookBase, TrainerBase

__all__ = [
    "BestCheckpointer",
    "CallbackHook",
    "EvalHook",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
]

_logger = logging.getLogger(__name__)

_Callback = Callable[[TrainerBase], Any] | None


class CallbackHook(HookBase):
    """A hook made of functions, each called with the trainer."""

    def __init__(
        self,
        *,
        before_train: _Callback = None,
        after_train: _Callback = None,
        before_step: _Callback = None,
        after_step: _Callback = None,
    ):
        self._callbacks = {
            "before_train": before_train,
            "after_train": after_train,
            "before_step": before_step,
            "after_step": after_step,
        }

    def _call(self, point: str) -> None:
        callback = self._callbacks[point]
        if callback is not None:
            callback(self.trainer)

    def before_train(self) -> None:
        """Call ``before_train``."""
        self._call("before_train")

    def after_train(self) -> None:
        """Call ``after_train``."""
        self._call("after_train")

    def before_step(self) -> None:
        """Call ``before_step``."""
        self._call("before_step")

    def after_step(self) -> None:
        """Call ``after_step``."""
        self._call("after_step")


class IterationTimer(HookBase):
    """Record the seconds of each step as ``time`` and log a summary at the end.

    Register it first: what later hooks do is then counted as time on hooks.
    """

    def __init__(self, warmup_iter: int = 3):
        """Start timing with step number ``warmup_iter`` (counted from 1)."""
        self._warmup_iter = warmup_iter
        self._start_clock()

    def _start_clock(self) -> None:
        self._started = time.perf_counter()
        self._timed_steps = 0
        self._step_seconds = 0.0

    def before_train(self) -> None:
        """Start the clock."""
        self._start_clock()

    def before_step(self) -> None:
        """Start timing a step."""
        self._step_started = time.perf_counter()

    def after_step(self) -> None:
        """Record the step's time unless it belongs to the warm-up."""
        seconds = time.perf_counter() - self._step_started
        if self.trainer.iter - self.trainer.start_iter + 1 < self._warmup_iter:
            self._start_clock()
            return
        self._timed_steps += 1
        self._step_seconds += seconds
        self.trainer.storage.put_scalars(time=seconds)

    def after_train(self) -> None:
        """Log the overall speed and how much time the hooks took."""
        total = time.perf_counter() - self._started
        if self._timed_steps:
            _logger.info(
                f"{self._timed_steps} timed iterations took {_hms(self._step_seconds)}, "
                f"{self._step_seconds / self._timed_steps:.4f} s each"
            )
        on_hooks = total - self._step_seconds
        _logger.info(f"Training took {_hms(total)} in all, of which hooks took {_hms(on_hooks)}")


class PeriodicWriter(HookBase):
    """Call event writers every ``period`` iterations and at the end, then close them."""

    def __init__(self, writers: list[EventWriter], period: int = 20):
        for writer in writers:
            assert isinstance(writer, EventWriter), f"writer is {writer!r}, expected an EventWriter"
        self._writers = writers
        self._period = period

    def after_step(self) -> None:
        """Write if it is time."""
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        """Write what other hooks recorded at the end, then close the writers."""
        for writer in self._writers:
            writer.write()
            writer.close()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's periodic checkpointer as a hook: every ``period`` iterations and at the last."""

    def before_train(self) -> None:
        """Learn from the trainer which iteration is the last."""
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        """Save if it is time."""
        self.step(self.trainer.iter)


class _AtEvaluations(HookBase):
    """Runs :meth:`_act` every ``period`` iterations and once after a completed training.

    The last iteration is left to :meth:`after_train`, so that nothing runs twice.
    """

    _period: int  # 0: only after training

    def _act(self) -> None:
        raise NotImplementedError

    def after_step(self) -> None:
        """Act if it is time."""
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._act()

    def after_train(self) -> None:
        """Act unless training stopped early."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._act()


class EvalHook(_AtEvaluations):
    """Run an evaluation periodically and after training, and record its results."""

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], dict[str, Any] | None],
        eval_after_train: bool = True,
    ):
        """Register it in every process or in none: they wait for each other.

        Args:
            eval_period: iterations between two evaluations; 0 for none during training.
            eval_function: returns numbers in (nested) dicts, or nothing. ``{"bbox": {"AP": 1}}``
                is recorded as ``bbox/AP``; NaN is a valid result.
            eval_after_train: whether to evaluate after the last iteration.

        Raises:
            ValueError: (at the evaluation) a result is not a number.
        """
        self._period = eval_period
        self._func = eval_function
        self._eval_after_train = eval_after_train

    def _act(self) -> None:
        results = self._func()
        for name, value in _flat_floats(results or {}).items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        # Processes may need different times; let none run ahead into the next step.
        comm.synchronize()

    def after_train(self) -> None:
        """Evaluate if asked to, unless training stopped early."""
        if self._eval_after_train:
            super().after_train()


class BestCheckpointer(_AtEvaluations):
    """Save a checkpoint whenever a metric is better than ever before in this run.

    Register it after the :class:`EvalHook` that produces the metric, with the same period.

    Attributes:
        best_metric: best finite value so far, or None.
        best_iter: the iteration it belongs to, or None.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        """Prepare to follow one metric.

        Args:
            eval_period: the period of the :class:`EvalHook`.
            checkpointer: saves ``<file_prefix>.pth``.
            val_metric: name in the storage, such as ``bbox/AP``.
            mode: whether the ``max`` or the ``min`` is best.
            file_prefix: name of the checkpoint.
        """
        assert mode in ("max", "min"), f"mode is {mode!r}, expected 'max' or 'min'"
        self._period = eval_period
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._sign = 1 if mode == "max" else -1
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def _act(self) -> None:
        name = self._val_metric
        value, iteration = self.trainer.storage.latest().get(name, (None, None))
        if value is None:
            _logger.warning(f"Metric {name} was not recorded; no best checkpoint is saved")
        elif not self._is_best(value):
            best = f"{self.best_metric} @ iteration {self.best_iter}"
            _logger.info(f"{name} is {value:.5f} @ iteration {iteration}; the best stays {best}")
        else:
            self.best_metric, self.best_iter = value, iteration
            self._checkpointer.save(self._file_prefix, iteration=iteration)
            _logger.info(f"Saved the best model: {name} is {value:.5f} @ iteration {iteration}")

    def _is_best(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        return self.best_metric is None or self._sign * (value - self.best_metric) > 0


class LRScheduler(HookBase):
    """Step a learning-rate scheduler after every iteration and record ``lr``."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: _TorchScheduler | ParamScheduler | None = None,
    ):
        """Take the parts, or the trainer's ``optimizer`` and ``scheduler`` for those not given.

        Args:
            optimizer: whose learning rates are set.
            scheduler: a torch scheduler, or an fvcore one that multiplies the base rates.
        """
        self._optimizer = optimizer
        self._scheduler = scheduler

    @property
    def scheduler(self) -> _TorchScheduler | ParamScheduler:
        """The scheduler given, or else the trainer's."""
        return self._scheduler or self.trainer.scheduler  # type: ignore[attr-defined]

    def before_train(self) -> None:
        """Bind an fvcore scheduler to the optimizer, for the iteration training starts at."""
        trainer = self.trainer
        if self._optimizer is None:
            self._optimizer = trainer.optimizer  # type: ignore[attr-defined]
        factors = self.scheduler
        if isinstance(factors, ParamScheduler):
            previous = trainer.iter - 1
            bound = LRMultiplier(self._optimizer, factors, trainer.max_iter, last_iter=previous)
            self._scheduler = bound
        self._recorded_group = self.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """Index of the group whose rate stands for all: the first with the most parameters.

        If no group has more than one, it is the first with the most common rate.
        """
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in optimizer.param_groups]
        [(most_common, _)] = Counter(rates).most_common(1)
        return rates.index(most_common)

    def after_step(self) -> None:
        """Record the rate of this iteration, then set the next one."""
        assert self._optimizer is not None
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self.trainer.storage.put_scalars(lr=rates[self._recorded_group], smoothing_hint=False)
        self.scheduler.step()  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """State of the scheduler, empty as long as it is not bound to an optimizer."""
        if isinstance(self.scheduler, _TorchScheduler):
            return self.scheduler.state_dict()
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a torch scheduler; an fvcore one needs no more than the iteration."""
        if isinstance(self.scheduler, _TorchScheduler):
            self.scheduler.load_state_dict(state_dict)


def _flat_floats(results: dict[str, Any]) -> dict[str, float]:
    assert isinstance(results, dict), (
        f"EvalHook: evaluation returned a {type(results).__name__}, expected a dict"
    )
    numbers = {}
    for name, value in flatten_results_dict(results).items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"EvalHook: result {name} is {value!r}, expected a number") from error
    return numbers


def _hms(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
