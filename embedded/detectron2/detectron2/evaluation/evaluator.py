"""The loop of inference over a data set, and the interface of what measures the outputs."""

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from detectron2.utils.comm import get_world_size, is_main_process
from detectron2.utils.logger import log_every_n_seconds

__all__ = ["DatasetEvaluator", "DatasetEvaluators", "inference_context", "inference_on_dataset"]

logger = logging.getLogger(__name__)

_WARMUP_BATCHES = 5
_SLOW_BATCH_SECONDS = 5
_SECONDS_BETWEEN_LOGS = 5


class DatasetEvaluator:
    """Collects what a model makes of its inputs, and measures it in the end."""

    def reset(self) -> None:
        """Forget everything; called before the first batch."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in a batch of inputs and the outputs for them, in the same order."""

    def evaluate(self) -> dict | None:
        """Return task to metric to value; None or empty where another process has the results."""


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one."""

    def __init__(self, evaluators: Sequence[DatasetEvaluator]):
        """Take evaluators whose results have different keys."""
        self._evaluators = evaluators

    def reset(self) -> None:
        """Reset all evaluators."""
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Hand a batch to all evaluators."""
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict:
        """Return the results of all; AssertionError if two share a key."""
        results: dict = {}
        for evaluator in self._evaluators:
            result = evaluator.evaluate()
            if is_main_process() and result is not None:
                repeated = results.keys() & result.keys()
                assert not repeated, f"several evaluators give results for {sorted(repeated)}"
                results.update(result)
        return results


def inference_on_dataset(
    model: Callable[[Any], Any],
    data_loader: Iterable,
    evaluator: DatasetEvaluator | list[DatasetEvaluator] | None,
    callbacks: Mapping[str, Callable[[], None]] | None = None,
) -> dict:
    """Run a model in eval mode and without gradients over all batches; return the evaluation.

    Args:
        model: called with each batch.
        data_loader: batches; must have a length.
        evaluator: one, several, or None to measure only the time.
        callbacks: functions for "on_start", "before_inference", "after_inference", "on_end".

    Returns:
        What the evaluator's ``evaluate`` returns, or an empty dict in place of None.
    """
    measure = _as_one(evaluator)
    measure.reset()
    total = len(data_loader)  # type: ignore[arg-type]
    logger.info("Inference on %d batches begins", total)
    eval_mode = inference_context(model) if isinstance(model, nn.Module) else nullcontext()
    with torch.no_grad(), eval_mode:
        watch = _run_batches(model, data_loader, measure, callbacks or {}, total)
    watch.report_total()
    results = measure.evaluate()
    return {} if results is None else results


def _as_one(evaluator: DatasetEvaluator | list[DatasetEvaluator] | None) -> DatasetEvaluator:
    if evaluator is None or isinstance(evaluator, MutableSequence):
        return DatasetEvaluators(evaluator or [])
    return evaluator


def _run_batches(
    model: Callable[[Any], Any],
    data_loader: Iterable,
    evaluator: DatasetEvaluator,
    callbacks: Mapping[str, Callable[[], None]],
    total: int,
) -> "_StopWatch":
    def call_back(point: str) -> None:
        if point in callbacks:
            callbacks[point]()

    call_back("on_start")
    watch = _StopWatch(total)
    for inputs in data_loader:
        watch.begin_batch()
        call_back("before_inference")
        outputs = model(inputs)
        call_back("after_inference")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        watch.lap("compute")
        evaluator.process(inputs, outputs)
        watch.lap("eval")
        watch.report_progress()
    call_back("on_end")
    return watch


class _StopWatch:
    """Times loading, inference and evaluation per batch, from the end of a short warm-up on."""

    def __init__(self, total: int):
        self._total = total
        self._warmup = max(0, min(_WARMUP_BATCHES, total - 1))
        self._done = 0
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self._start = self._last = now
        self._seconds = {"data": 0.0, "compute": 0.0, "eval": 0.0}

    def lap(self, part: str) -> None:
        """Book the time since the last lap to ``part``."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def begin_batch(self) -> None:
        """Book the loading of a batch, and forget the warm-up once it is over."""
        self.lap("data")
        if self._done == self._warmup:
            self._restart(self._last)
        self._done += 1

    @property
    def _timed(self) -> int:
        return self._done - self._warmup if self._done > self._warmup else self._done

    def report_progress(self) -> None:
        """Log times per batch and the time left, every few seconds."""
        each = {part: seconds / self._timed for part, seconds in self._seconds.items()}
        if self._done <= 2 * self._warmup and each["compute"] <= _SLOW_BATCH_SECONDS:
            return
        whole = (self._last - self._start) / self._timed
        eta = datetime.timedelta(seconds=int(whole * (self._total - self._done)))
        log_every_n_seconds(
            logging.INFO,
            f"Batch {self._done} of {self._total}, {eta} left; {whole:.4f} s per batch: "
            f"data {each['data']:.4f}, model {each['compute']:.4f}, evaluator {each['eval']:.4f}",
            n=_SECONDS_BETWEEN_LOGS,
        )

    def report_total(self) -> None:
        """Log the time of everything after the warm-up."""
        batches = max(1, self._total - self._warmup)
        whole, compute = time.perf_counter() - self._start, self._seconds["compute"]
        for what, seconds in (("Inference with all around it", whole), ("The model", compute)):
            logger.info(
                "%s took %s, %.6f s per batch (processes: %d)",
                what,
                datetime.timedelta(seconds=int(seconds)),
                seconds / batches,
                get_world_size(),
            )


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while, and back into its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
