"""Hooks that the trainer runs beside detectron2's own."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from .checkpoint import AtomicCheckpointer, stored_best, write_atomically
from .ema import ModelEma
from .errors import did_you_mean, exit_now
from .rng import preserve_rng, set_rng_state
from .trainer import DistillationTrainer

__all__ = [
    "CheckpointHook",
    "EmaHook",
    "EvaluationHook",
    "MetricsState",
    "ResumeRng",
    "StopOnSignal",
    "WriterHook",
    "lost_records",
    "truncate_metrics",
]

logger = logging.getLogger(__name__)


class CheckpointHook(hooks.PeriodicCheckpointer):
    """Saves every ``period`` iterations and at the end, and keeps the newest ``max_to_keep``.

    Register it in all processes, saving collects their random states.
    """

    trainer: DistillationTrainer
    checkpointer: AtomicCheckpointer

    def __init__(
        self, checkpointer: AtomicCheckpointer, period: int, max_to_keep: int | None = None
    ) -> None:
        super().__init__(checkpointer, period)
        self._keep = max_to_keep

    def after_step(self) -> None:
        """Save if it is time."""
        super().after_step()
        if self._keep is not None and (self.trainer.iter + 1) % self.period == 0:
            self.checkpointer.prune(self._keep)

    def after_train(self) -> None:
        """Save the end of a run that was interrupted right before that."""
        if self.trainer.completed and self.trainer.start_iter >= self.trainer.max_iter:
            last = self.trainer.max_iter - 1
            self.trainer.iter = last  # the state must be that of the last iteration, not after it
            self.checkpointer.save(f"{self.file_prefix}_final", iteration=last)
            self.trainer.iter = self.trainer.max_iter


class EmaHook(HookBase):
    """Updates a model's moving average after each step."""

    def __init__(self, ema: ModelEma) -> None:
        self._ema = ema

    def before_train(self) -> None:
        """Start from the model's weights, unless averages were loaded."""
        self._ema.start()

    def after_step(self) -> None:
        """Take in the new weights."""
        self._ema.update()


class EvaluationHook(HookBase):
    """Evaluates every ``period`` iterations (0: never) and after the last.

    Results go to the event storage, and the weights with the highest ``best_metric`` so far to
    model_best.pth. Evaluating leaves the random generators as they were. A periodic evaluation
    that an interruption cut short is made up for when training resumes.

    Args:
        period: iterations between two evaluations.
        evaluate: returns nested dicts of numbers.
        checkpointer: for the best weights.
        best_metric: such as "bbox/AP"; empty to keep none.

    Attributes:
        redo: evaluate before the first step, because an interruption cut that short.
    """

    trainer: DistillationTrainer

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict],
        checkpointer: AtomicCheckpointer,
        best_metric: str = "",
    ) -> None:
        self._period = period
        self._evaluate = evaluate
        self._checkpointer = checkpointer
        self._metric = best_metric
        self._best = -math.inf
        self._warned = False
        self.redo = False

    def before_train(self) -> None:
        """Make up for the evaluation that an interruption cut short."""
        if self.trainer.start_iter:  # a checkpoint is older than the evaluation that follows it
            self._best = max(self._best, stored_best(self._checkpointer.save_dir))
        if self.redo and self._due(self.trainer.start_iter):
            self._run(self.trainer.start_iter - 1)

    def after_step(self) -> None:
        """Evaluate if it is time."""
        if self._due(self.trainer.iter + 1):
            self._run(self.trainer.iter)

    def after_train(self) -> None:
        """Evaluate the final weights, unless training was cut short."""
        if self.trainer.completed:
            self._run(self.trainer.max_iter)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {"best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best value so far."""
        self._best = state["best"]

    def _due(self, done: int) -> bool:
        return self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter

    def _run(self, iteration: int) -> None:
        with preserve_rng():
            results = self._evaluate() or {}
        values = {key: float(value) for key, value in flatten_results_dict(results).items()}
        self.trainer.storage.put_scalars(**values, smoothing_hint=False, cur_iter=iteration)
        self._keep_best(values, iteration)
        comm.synchronize()  # the others may have had fewer images

    def _keep_best(self, values: dict[str, float], iteration: int) -> None:
        value = values.get(self._metric, math.nan)
        if self._metric and values and self._metric not in values and not self._warned:
            self._warned = True
            hint = did_you_mean(self._metric, values)
            logger.warning(
                "train.best_metric '%s' is not among the results%s: no model_best.pth",
                self._metric,
                hint,
            )
        if value > self._best:
            self._best = value
            self._checkpointer.save_weights("model_best", iteration=iteration, best=value)
            logger.info("%s = %.4f is the best so far: model_best.pth", self._metric, value)


class ResumeRng(HookBase):
    """Restores this process's random state right before the first step; register it late."""

    def __init__(self, states: list[dict[str, Any]] | None) -> None:
        self._states = states

    def before_train(self) -> None:
        """Restore, if training resumes with as many processes as it was stopped with."""
        if self._states is None:
            return
        if len(self._states) == comm.get_world_size():
            set_rng_state(self._states[comm.get_rank()])
        else:
            logger.warning(
                "the checkpoint is of %d processes, this run has %d: random numbers differ",
                len(self._states),
                comm.get_world_size(),
            )


class MetricsState(HookBase):
    """Keeps recent metrics in the checkpoint, so that medians and log lines continue from it.

    Attributes:
        catch_up: the last finished iteration's line is still to be written, so restore it all.
    """

    def __init__(self, window: int = 20) -> None:
        self.catch_up = False
        self._window = window
        self._recent: dict[str, list[list[float]]] = {}
        self._latest: dict[str, float] = {}

    def before_train(self) -> None:
        """Put the kept values into the new event storage."""
        storage, start = self.trainer.storage, self.trainer.start_iter
        if start < self.trainer.max_iter or self.catch_up:
            for name, values in self._recent.items():
                for value, iteration in values:
                    storage.put_scalar(name, value, cur_iter=int(iteration))
        if self.catch_up:
            for name, value in self._latest.items():
                storage.put_scalar(name, value, smoothing_hint=False, cur_iter=start - 1)
        self._hide_written(storage.latest())

    def _hide_written(self, latest: dict[str, tuple[float, int]]) -> None:
        """Leave in ``latest``, from which the writers take what is new, only what they lack."""
        lacking = self.trainer.start_iter - 1 if self.catch_up else None
        for name in [name for name, (_, iteration) in latest.items() if iteration != lacking]:
            del latest[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the last values of smoothed metrics, and this iteration's of the others."""
        storage, now = self.trainer.storage, self.trainer.iter
        hints = storage.smoothing_hints()
        recent = {
            name: [[float(value), float(iteration)] for value, iteration in history.values()]
            for name, history in storage.histories().items()
            if hints[name]
        }
        latest = {
            name: float(value)
            for name, (value, iteration) in storage.latest().items()
            if iteration == now and not hints[name]
        }
        trimmed = {name: values[-self._window :] for name, values in recent.items()}
        return {"recent": trimmed, "latest": latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the values until training starts."""
        self._recent, self._latest = state["recent"], state["latest"]


class WriterHook(hooks.PeriodicWriter):
    """Calls the writers every ``period`` iterations, and at the start if ``catch_up``."""

    def __init__(self, writers: list[EventWriter], period: int, catch_up: bool = False) -> None:
        super().__init__(writers, period)
        self._pending = writers if catch_up else []

    def before_train(self) -> None:
        """Write what an interruption has prevented, as of the iteration it belongs to."""
        self.trainer.storage.iter = self.trainer.start_iter - 1
        for writer in self._pending:
            writer.write()
        self.trainer.storage.iter = self.trainer.start_iter


class StopOnSignal(HookBase):
    """Lets SIGTERM and SIGINT end the run after its present iteration, with a checkpoint.

    The trainer then raises :class:`~engine.errors.Interrupted`. A second signal, more than a second
    later, ends the process at once. Register it last, in all processes.
    """

    trainer: DistillationTrainer
    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, checkpointer: AtomicCheckpointer) -> None:
        self._checkpointer = checkpointer
        self._previous: dict[int, Any] = {}
        self._first_at = 0.0

    def before_train(self) -> None:
        """Install the handlers."""
        for signum in self.signals:
            self._previous[signum] = signal.signal(signum, self._handle)

    def after_step(self) -> None:
        """Save if all processes agreed to stop."""
        if self.trainer.agreed_stop:
            iteration = self.trainer.iter
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            comm.synchronize()  # a launcher ends all processes once one has ended
            logger.info("stopped by signal %d; continue with --resume", self.trainer.agreed_stop)

    def after_train(self) -> None:
        """Put the former handlers back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.trainer.completed:  # all is saved: only the last evaluation is lost
            exit_now(128 + signum)
        now = time.monotonic()
        if not self.trainer.requested_stop:
            self._first_at = now
            self.trainer.requested_stop = signum
            logger.warning("signal %d: stopping after this iteration (again: at once)", signum)
        elif now - self._first_at > 1.0:  # a terminal and a launcher may both pass on the same one
            exit_now(128 + signum)


def truncate_metrics(path: Path, iterations: int) -> None:
    """Drop what a resumed run will write again: lines of iterations from ``iterations`` on.

    A last line that was cut off is dropped too. The file is replaced in one step.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _iteration_of(line) < iterations]
    if len(kept) < len(lines):
        write_atomically(path, lambda file: file.write(b"".join(kept)))


def lost_records(path: Path, iteration: int) -> tuple[bool, bool]:
    """Whether metrics.json lacks an iteration's losses, and its evaluation (keys with a slash)."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    text = b"".join(line for line in lines if _iteration_of(line) == iteration)
    return b'"total_loss"' not in text, b"/" not in text


def _iteration_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf
