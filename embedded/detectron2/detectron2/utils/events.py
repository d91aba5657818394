"""Storage of training metrics and the writers that show them."""

import datetime
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

from detectron2.utils.file_io import PathManager

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]

_active_storages: list["EventStorage"] = []


def get_event_storage() -> "EventStorage":
    """Return the innermost active storage; an error outside ``with EventStorage(...)``."""
    assert _active_storages, "no active event storage: call this inside 'with EventStorage(...)'"
    return _active_storages[-1]


def has_event_storage() -> bool:
    """Whether an event storage is active."""
    return bool(_active_storages)


class EventStorage:
    """Scalars (with history), images and histograms of a training run, by iteration."""

    def __init__(self, start_iter: int = 0):
        self._iter = start_iter
        self._prefix = ""
        self._history: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self._images: list[tuple[str, Any, int]] = []
        self._histograms: list[dict[str, Any]] = []

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        """Store an RGB image (3, H, W), float in [0, 1] or uint8, for TensorBoard."""
        self._images.append((img_name, img_tensor, self._iter))

    def put_scalar(
        self, name: str, value: Any, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Store one value of the scalar ``name``.

        Args:
            name: name, to which the active name scope is prepended.
            value: a number or a one-element tensor.
            smoothing_hint: whether writers should smooth it; the same in every call for a name.
            cur_iter: iteration of the value; the current one by default.
        """
        name = self._prefix + name
        hint = self._smoothing_hints.setdefault(name, smoothing_hint)
        assert hint == smoothing_hint, (
            f"scalar '{name}': smoothing_hint is {smoothing_hint}, was {hint} before"
        )
        value = float(value)
        iteration = self._iter if cur_iter is None else cur_iter
        self._history[name].update(value, iteration)
        self._latest[name] = (value, iteration)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: Any
    ) -> None:
        """Store one value of several scalars, given as keyword arguments."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Store the histogram of all values of a tensor, for TensorBoard."""
        values = hist_tensor.detach().float().flatten()
        low, high = values.min().item(), values.max().item()
        edges = torch.linspace(low, high, bins + 1)
        self._histograms.append(
            {
                "tag": hist_name,
                "min": low,
                "max": high,
                "num": values.numel(),
                "sum": values.sum().item(),
                "sum_squares": values.square().sum().item(),
                "bucket_limits": edges[1:].tolist(),
                "bucket_counts": torch.histc(values, bins=bins).tolist(),
                "global_step": self._iter,
            }
        )

    def history(self, name: str) -> HistoryBuffer:
        """Return all stored values of a scalar; a KeyError if there is none."""
        if name not in self._history:
            raise KeyError(f"no scalar '{name}' has been stored")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Return the history of every scalar."""
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """Return the latest value of every scalar and its iteration."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Return as :meth:`latest`, noisy scalars as medians over the last iterations."""
        return {
            name: (self._median(name, window_size), iteration)
            if self._smoothing_hints[name]
            else (value, iteration)
            for name, (value, iteration) in self._latest.items()
        }

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Count the values of a scalar within ``window_size`` iterations of its latest one."""
        values = self._history[name].values()
        oldest = values[-1][1] - window_size
        for count, (_, iteration) in enumerate(reversed(values)):
            if iteration <= oldest:
                return count
        return len(values)

    def _median(self, name: str, window_size: int) -> float:
        return self._history[name].median(self.count_samples(name, window_size))

    def smoothing_hints(self) -> dict[str, bool]:
        """Return for every scalar whether writers should smooth it."""
        return self._smoothing_hints

    def step(self) -> None:
        """Go to the next iteration."""
        self._iter += 1

    @property
    def iter(self) -> int:
        """The current iteration."""
        return self._iter

    @iter.setter
    def iter(self, val: int) -> None:
        self._iter = int(val)

    @property
    def iteration(self) -> int:
        """The current iteration (older name of :attr:`iter`)."""
        return self._iter

    def __enter__(self) -> "EventStorage":
        _active_storages.append(self)
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        assert _active_storages[-1] is self, "event storages must be left in reverse order"
        _active_storages.pop()

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Prepend ``name/`` to the scalars that are stored inside this context."""
        outer, self._prefix = self._prefix, name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._prefix = outer

    def clear_images(self) -> None:
        """Forget the stored images."""
        self._images = []

    def clear_histograms(self) -> None:
        """Forget the stored histograms."""
        self._histograms = []


class EventWriter:
    """Base class: takes metrics from the active storage and shows them somewhere."""

    def write(self) -> None:
        """Write what is new in the active storage."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files."""


class JSONWriter(EventWriter):
    """Appends scalars to a file, one JSON object per line and iteration."""

    def __init__(self, json_file: str, window_size: int = 20):
        """Open the file; a last line that an interrupted run left half-written is dropped."""
        _repair_last_line(json_file)
        self._file = PathManager.open(json_file, "a")
        self._window_size = window_size
        self._last_write = -1

    def write(self) -> None:
        """Append the scalars that are newer than the last call."""
        lines: dict[int, dict[str, float]] = defaultdict(dict)
        for name, value, iteration in _newer_scalars(self._last_write, self._window_size):
            lines[iteration][name] = value
        for iteration, scalars in lines.items():
            self._file.write(json.dumps({**scalars, "iteration": iteration}, sort_keys=True) + "\n")
        self._last_write = max(lines, default=self._last_write)
        self._file.flush()
        if hasattr(self._file, "fileno"):  # remote files have none
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _newer_scalars(last_write: int, window_size: int) -> list[tuple[str, float, int]]:
    """Name, value and iteration of the scalars stored after iteration ``last_write``."""
    latest = get_event_storage().latest_with_smoothing_hint(window_size)
    return [(name, *entry) for name, entry in latest.items() if entry[1] > last_write]


def _repair_last_line(json_file: str) -> None:
    if not PathManager.isfile(json_file):
        return
    with PathManager.open(json_file, "rb+") as file:
        content = file.read()
        rest = content[content.rfind(b"\n") + 1 :]
        if not rest:
            return
        try:
            json.loads(rest)
        except ValueError:
            file.truncate(len(content) - len(rest))
        else:
            file.write(b"\n")


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms for TensorBoard."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any):
        """Keep the arguments; the file is created at the first write.

        Args:
            log_dir: folder of the event files.
            window_size: iterations over which noisy scalars are smoothed.
            **kwargs: passed to ``torch.utils.tensorboard.SummaryWriter``.
        """
        self._window_size = window_size
        self._arguments = {"log_dir": log_dir, **kwargs}
        self._last_write = -1

    @cached_property
    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        return SummaryWriter(**self._arguments)

    def write(self) -> None:
        """Write the scalars that are newer than the last call, and all images and histograms."""
        scalars = _newer_scalars(self._last_write, self._window_size)
        for scalar in scalars:
            self._writer.add_scalar(*scalar)
        self._last_write = max((iteration for *_, iteration in scalars), default=self._last_write)
        self._move_media(get_event_storage())

    def _move_media(self, storage: EventStorage) -> None:
        """Write images and histograms, which no other writer shows, and make the storage empty."""
        for image in storage._images:
            self._writer.add_image(*image)
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_images()
        storage.clear_histograms()

    def close(self) -> None:
        """Close the file, if one was opened."""
        if "_writer" in self.__dict__:
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs a line with iteration, ETA, losses, times, learning rate and GPU memory."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20):
        """Keep the arguments.

        Args:
            max_iter: total number of iterations, for the ETA; no ETA if not given.
            window_size: iterations over which losses are smoothed.
        """
        self.logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: tuple[int, float] | None = None

    def write(self) -> None:
        """Log one line; nothing once training is over."""
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return
        eta = self._eta(storage)
        line = f" eta: {eta}  " if eta else " "
        line += f"iter: {storage.iter}  "
        line += f"{self._medians(storage, 'loss')}  {self._medians(storage, '[metric]')}  "
        line += self._times(storage)
        lr = storage._latest.get("lr")
        line += f" lr: {lr[0]:.5g}  " if lr else " lr: N/A  "
        if torch.cuda.is_available():
            line += f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M"
        self.logger.info(line)

    def _medians(self, storage: EventStorage, word: str) -> str:
        return "  ".join(
            f"{name}: {storage._median(name, self._window_size):.4g}"
            for name in storage.histories()
            if word in name
        )

    def _times(self, storage: EventStorage) -> str:
        """Average and last time of an iteration, and of its wait for data."""
        histories, text = storage.histories(), ""
        if "time" in histories:
            time_ = histories["time"]
            text += f"time: {time_.global_avg():.4f}  last_time: {time_.latest():.4f}  "
        if "data_time" in histories:
            data = histories["data_time"]
            average = data.avg(storage.count_samples("data_time", self._window_size))
            text += f"data_time: {average:.4f}  last_data_time: {data.latest():.4f}  "
        return text

    def _eta(self, storage: EventStorage) -> str:
        """Remaining time; from the stored iteration times, else from the time between writes."""
        if self._max_iter is None:
            return ""
        remaining = self._max_iter - storage.iter - 1
        if "time" in storage.histories():
            seconds = storage.history("time").median(1000) * remaining
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            return str(datetime.timedelta(seconds=int(seconds)))
        now, last = time.perf_counter(), self._last_write
        self._last_write = (storage.iter, now)
        if last is None or storage.iter <= last[0]:
            return ""
        seconds = (now - last[1]) / (storage.iter - last[0]) * remaining
        return str(datetime.timedelta(seconds=int(seconds)))
