"""Where a detector's training step spends its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from detectors.detector import Detector

Flow = TypeVar("Flow")
STEPS = ("extract", "encode", "decode", "predict", "losses")
_Seam = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one of the detector's steps, named as its methods are."""

    step: str
    forward: float
    backward: float


def autocast(amp: bool) -> torch.autocast:
    """Mixed precision for a forward pass, or none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=amp)


def step_times(model: Detector, items: list[dict], amp: bool = False) -> list[StepTime]:
    """Time the steps one by one, each with its own backward pass.

    Tensors that go from one step to the next are cut out of the graph, and their gradients handed
    on, so the whole is an ordinary training step.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    images, targets = model.preprocess(items), model.prepare_targets(items)
    forward: list[float] = []
    seams: list[_Seam] = []

    def timed(step: Callable[[], Flow]) -> Flow:
        result, seconds = _time(step)
        forward.append(seconds)
        seams.append([])
        return _cut(result, seams[-1])

    with autocast(amp):
        features = timed(lambda: model.extract(images))
        memory = timed(lambda: model.encode(features, targets))
        output = timed(lambda: model.decode(memory, model.queries(memory, targets)))
        predictions = timed(lambda: model.predict(output))
        losses = timed(lambda: torch.stack(list(model.losses(predictions, targets).values())).sum())
    losses.grad = torch.ones_like(losses)
    backward = [_time(partial(_pull, seam))[1] for seam in reversed(seams)]
    return [StepTime(*entry) for entry in zip(STEPS, forward, reversed(backward), strict=True)]


def _time(run: Callable[[], Flow]) -> tuple[Flow, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def _cut(value: Any, seam: _Seam) -> Any:
    """The same with leaves in place of tensors that have a history; both go into ``seam``."""
    if isinstance(value, Tensor) and value.requires_grad:
        seam.append((value, value.detach().requires_grad_()))
        return seam[-1][1]
    if type(value) is tuple:
        return tuple(_cut(part, seam) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: _cut(getattr(value, field.name), seam) for field in fields(value)}
        )
    return value


def _pull(seam: _Seam) -> None:
    """Run the backward pass of a step from the gradients that its results have received."""
    used = [(own, leaf.grad) for own, leaf in seam if leaf.grad is not None]
    torch.autograd.backward([own for own, _ in used], [grad for _, grad in used])


def busiest_operators(run: Callable[[], object], count: int = 8) -> list[tuple[str, float]]:
    """Operators and their shares of the time of a call, the busiest first."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [(event.key, event.self_cpu_time_total / total) for event in events[:count]]
