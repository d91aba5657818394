"""Which share of a step the teacher takes."""

from __future__ import annotations

import time

import torch


class StepClock:
    """Measures from one step's start to the next one's, and the teacher's part at its beginning.

    On CUDA the events are read a step later, so that nothing waits for the device.
    """

    def __init__(self) -> None:
        self._marks: list = []
        self._whole: list[tuple] = []
        self._share = 0.0

    @property
    def teacher_share(self) -> float:
        """Of the last step that has been measured whole; 0 before there is one."""
        return self._share

    def start_step(self, device: torch.device) -> None:
        """Say that a step starts, with the teacher."""
        now = self._now(device)
        if len(self._marks) == 2:
            self._whole.append((*self._marks, now))
        while len(self._whole) > (device.type == "cuda"):  # which may not be there yet
            start, teacher, end = self._whole.pop(0)
            self._share = _between(start, teacher) / max(_between(start, end), 1e-9)
        self._marks = [now]
        self._device = device

    def stop_teacher(self) -> None:
        """Say that the teacher is done."""
        self._marks.append(self._now(self._device))

    @staticmethod
    def _now(device: torch.device) -> float | torch.cuda.Event:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # type: ignore[operator]
    end.synchronize()
    return start.elapsed_time(end)
