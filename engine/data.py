"""A training stream whose every batch is a function of the seed, whatever the processes.

Epochs are shuffled with one seed and cut into total batches, of similar aspect ratio if asked; each
process takes its contiguous share. A sample's augmentation is seeded by its position in the stream.
So neither the number of processes, nor that of workers, nor an interruption changes a batch.
"""

import itertools
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .boxes import drop_bad_boxes, float_boxes
from .errors import LocalError, UserError
from .rng import preserve_rng, seed_cpu

__all__ = ["BatchStream", "ResumableTrainLoader", "build_resumable_train_loader", "image_fault"]

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""(position in the stream, index in the data set)."""


def build_resumable_train_loader(
    dataset: Any,
    *,
    mapper: Callable[[dict], Any],
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    sampler: None = None,
    collate_fn: Callable[[list], Any] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> "ResumableTrainLoader":
    """Build the loader; its keywords are those of detectron2's ``build_detection_train_loader``.

    Args:
        dataset: list of dataset dicts, or a map-style dataset that yields them.
        mapper: makes a sample from a dataset dict; may return None to skip it.
        total_batch_size: images per batch over all processes.
        aspect_ratio_grouping: put only wide, or only tall, images into a batch.
        num_workers: loading processes; does not change the batches.
        sampler: must be None, the order is the stream's own.
        collate_fn: applied to this process's list of samples; the list itself without it.
        seed: of order and augmentation; None or negative draws one that all processes share.
        kwargs: for ``torch.utils.data.DataLoader``.

    Raises:
        UserError: the batch cannot be split over the processes, or the data set is empty.
    """
    if sampler is not None:
        raise UserError("build_resumable_train_loader orders the images itself: remove 'sampler'")
    world = comm.get_world_size()
    if total_batch_size <= 0 or total_batch_size % world:
        raise UserError(
            f"total_batch_size is {total_batch_size}, expected a positive multiple of the "
            f"{world} processes"
        )
    if not callable(mapper):
        raise UserError(f"the training data's mapper is {mapper}, expected a callable")
    if not isinstance(num_workers, int) or num_workers < 0:
        raise UserError(f"num_workers is {num_workers}, expected a whole number from 0")
    if len(dataset) == 0:
        raise UserError("the training data set holds no image")
    if seed is None or seed < 0:
        seed = comm.shared_random_seed()
    groups = aspect_groups(dataset) if aspect_ratio_grouping else [0] * len(dataset)
    if isinstance(dataset, list):
        dataset = DatasetFromList(drop_bad_boxes(dataset), copy=False)
    return ResumableTrainLoader(
        _SeededSamples(dataset, mapper, groups, seed),
        BatchStream(groups, total_batch_size, seed),
        num_workers=num_workers,
        collate_fn=collate_fn,
        **kwargs,
    )


def aspect_groups(dataset: Sequence[dict]) -> list[int]:
    """Return 0 for each image that is wider than high and 1 for each other."""
    return [0 if record["width"] > record["height"] else 1 for record in dataset]


class BatchStream:
    """The endless sequence of total batches."""

    def __init__(self, groups: Sequence[int], total_batch_size: int, seed: int) -> None:
        self.groups = groups
        self.total_batch_size = total_batch_size
        self.seed = seed

    def batches(self, start: int = 0) -> Iterator[list[Key]]:
        """Yield the batches from number ``start`` on, without touching an image."""
        return itertools.islice(self._all(), start, None)

    def _all(self) -> Iterator[list[Key]]:
        waiting: dict[int, list[Key]] = {}
        for key in enumerate(self._indices()):
            batch = waiting.setdefault(self.groups[key[1]], [])
            batch.append(key)
            if len(batch) == self.total_batch_size:
                yield waiting.pop(self.groups[key[1]])

    def _indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.groups), generator=generator).tolist()


class ResumableTrainLoader:
    """Iterates over this process's share of each batch; :meth:`seek` sets where to start."""

    def __init__(
        self,
        samples: "_SeededSamples",
        stream: BatchStream,
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.samples = samples
        self.stream = stream
        self._start = 0
        self._collate = collate_fn
        self._options = {"num_workers": num_workers, **kwargs}
        self._warned: set[str] = set()

    def seek(self, batch: int) -> None:
        """Let the next iteration begin with batch number ``batch`` of the stream."""
        self._start = batch

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            self.samples,
            batch_sampler=_Restartable(self._share),
            collate_fn=_unzip,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # so that starting does not draw from the global one
            **self._options,
        )
        for samples, skipped in loader:
            self._warn(skipped)
            yield samples if self._collate is None else self._collate(samples)

    def _share(self) -> Iterator[list[Key]]:
        size = self.stream.total_batch_size // comm.get_world_size()
        first = comm.get_rank() * size
        for batch in self.stream.batches(self._start):
            yield batch[first : first + size]

    def _warn(self, skipped: list[str]) -> None:
        for fault in skipped:
            if fault not in self._warned:
                self._warned.add(fault)
                logger.warning("%s: skipped, another takes its place", fault)


class _Restartable:
    """An iterable that calls ``make`` for each new iteration."""

    def __init__(self, make: Callable[[], Iterator[list[Key]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[list[Key]]:
        return self._make()


class _SeededSamples(Dataset):
    """Maps (position, index) to (sample, faults of the images met on the way), batch by batch."""

    def __init__(
        self, dataset: Any, mapper: Callable[[dict], Any], groups: Sequence[int], seed: int
    ) -> None:
        self._dataset = dataset
        self._mapper = mapper
        self._groups = groups
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: Key) -> tuple[Any, list[str]]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[tuple[Any, list[str]]]:
        # once for a batch: for each sample it would be a tenth of the time of a small image
        with preserve_rng(cuda=False):
            return [self._sample(*key) for key in keys]

    def _sample(self, position: int, index: int) -> tuple[Any, list[str]]:
        skipped: list[str] = []
        for candidate in self._candidates(index):
            record = float_boxes(self._dataset[candidate])
            try:
                seed_cpu(self._seed, position)
                sample = self._mapper(record)
            except Exception:
                fault = image_fault(record.get("file_name"))
                if not fault:
                    raise  # the image is fine: the fault lies elsewhere
                skipped.append(fault)
                continue
            if sample is not None:
                return sample, skipped
        first = skipped[0] if skipped else f"the mapper made nothing of image {index}"
        raise LocalError(f"no image can be used: {first}")

    def _candidates(self, index: int) -> Iterator[int]:
        """The index itself, then those after it in the same group, so that batches stay uniform."""
        count = len(self._groups)
        for step in range(count):
            candidate = (index + step) % count
            if self._groups[candidate] == self._groups[index]:
                yield candidate


def image_fault(file_name: str | None) -> str:
    """Return why the file is no complete image; an empty string if it is, or without a name."""
    if file_name is None:
        return ""
    try:
        with Image.open(file_name) as image:
            image.load()
    except FileNotFoundError:
        return f"image {file_name} not found"
    except Exception:  # Pillow raises many types on broken files
        return f"cannot decode image {file_name}"
    return ""


def _unzip(pairs: list[tuple[Any, list[str]]]) -> tuple[list[Any], list[str]]:
    return [sample for sample, _ in pairs], [fault for _, faults in pairs for fault in faults]


def _leave_signals_to_parent(_worker: int) -> None:
    # A signal to the whole process group must not take the workers away before the parent has
    # finished its iteration; they end when the parent's iterator does, or with the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
