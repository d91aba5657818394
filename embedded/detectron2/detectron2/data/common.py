"""Datasets that wrap lists, functions and samplers, and the grouping of images by shape."""

import copy
import itertools
import logging
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

__all__ = ["AspectRatioGroupedDataset", "DatasetFromList", "MapDataset", "ToIterableDataset"]

logger = logging.getLogger(__name__)

_WARN_AFTER = 3


class MapDataset(Dataset):
    """A dataset whose elements went through a function, which may refuse some with None.

    In place of a refused element a map-style dataset gives another one, chosen at random but always
    the same for the same index; an iterable dataset goes on to its next element.
    """

    def __new__(cls, dataset: Dataset, map_func: Callable[[Any], Any]):
        """Give an iterable dataset if ``dataset`` is iterable, else a map-style one."""
        if isinstance(dataset, IterableDataset):
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __init__(self, dataset: Dataset, map_func: Callable[[Any], Any]):
        """Wrap ``dataset``; ``map_func`` returns the new element, or None to refuse it."""
        self._dataset = dataset
        self._map_func = map_func
        self._refused: set[int] = set()

    def __getnewargs__(self) -> tuple:
        return self._dataset, self._map_func

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, idx: int) -> Any:
        """Return a mapped element; ValueError once every element has been refused."""
        # Whether an index was refused before only saves calls: the substitute is the same without.
        substitutes = random.Random(int(idx))
        index, failures = int(idx), 0
        while (element := self._map_func(self._dataset[index])) is None:
            failures += 1
            if failures >= _WARN_AFTER:
                logger.warning("element %d: %d elements in a row gave nothing", idx, failures)
            self._refused.add(index)
            if len(self._refused) >= len(self):
                raise ValueError(f"none of the {len(self)} elements of the dataset could be mapped")
            while index in self._refused:
                index = substitutes.randrange(len(self))
        self._refused.discard(index)
        return element


class _MapIterableDataset(IterableDataset):
    def __init__(self, dataset: IterableDataset, map_func: Callable[[Any], Any]):
        self._dataset = dataset
        self._map_func = map_func

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for element in self._dataset:
            mapped = self._map_func(element)
            if mapped is not None:
                yield mapped


class DatasetFromList(Dataset):
    """A list as a dataset."""

    def __init__(
        self, lst: list, copy: bool = True, serialize: bool | Callable[[list], Any] = True
    ):
        """Wrap ``lst``.

        Args:
            lst: the elements.
            copy: give deep copies of them (serialised ones are new objects in any case).
            serialize: keep them pickled in one tensor, whose memory worker processes share; or a
                function from the list to what replaces it.

        Raises:
            ValueError: for an empty list that is to be pickled.
        """
        if not (isinstance(serialize, bool) or callable(serialize)):
            raise TypeError(f"serialize must be a bool or a function, found {serialize!r}")
        if serialize is True:
            serialize = _PickledList
        self._elements = serialize(lst) if serialize else lst
        self._copy = copy and not serialize

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, idx: int) -> Any:
        """Return one element."""
        element = self._elements[idx]
        return copy.deepcopy(element) if self._copy else element


class _PickledList:
    """Elements pickled back to back in a uint8 tensor.

    Python objects would be copied to every worker as their reference counts are touched.
    """

    def __init__(self, elements: list):
        if not elements:
            raise ValueError("the dataset is empty")
        pickles = [pickle.dumps(element, protocol=-1) for element in elements]
        self._ends = torch.tensor(list(itertools.accumulate(map(len, pickles))))
        self._bytes = torch.frombuffer(bytearray(b"".join(pickles)), dtype=torch.uint8)
        megabytes = len(self._bytes) / 1024**2
        logger.info("Serialized %d dataset elements into %.2f MiB", len(elements), megabytes)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # IndexError past the end, negative ones from there
        begin = int(self._ends[index - 1]) if index else 0
        own = self._bytes[begin : int(self._ends[index])].numpy()
        return pickle.loads(own.data)


class ToIterableDataset(IterableDataset):
    """A map-style dataset read in the order of a sampler, which each worker runs for itself."""

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ):
        """Combine dataset and sampler.

        Args:
            dataset: map-style.
            sampler: of its indices.
            shard_sampler: share the indices out between the workers of a loader; False if the
                sampler does so itself.
            shard_chunk_size: consecutive indices that go to the same worker.
        """
        assert not isinstance(dataset, IterableDataset), f"{dataset} is iterable already"
        assert isinstance(sampler, Sampler), f"expected a sampler, found {type(sampler)}"
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Yield the elements that fall to the current worker."""
        worker = get_worker_info() if self.shard_sampler else None
        for position, index in enumerate(self.sampler):
            chunk = position // self.shard_chunk_size
            if worker is None or chunk % worker.num_workers == worker.id:
                yield self.dataset[index]


class AspectRatioGroupedDataset(IterableDataset):
    """Batches that hold either only images wider than high, or only others, to save padding."""

    def __init__(self, dataset: Iterable[dict], batch_size: int):
        """Group the elements of ``dataset``, dicts with "width" and "height", into lists."""
        self.dataset = dataset
        self.batch_size = batch_size
        self._waiting: dict[bool, list[dict]] = {True: [], False: []}

    def __iter__(self) -> Iterator[list[dict]]:
        """Yield a batch whenever one is complete; incomplete ones wait for the next iteration."""
        for element in self.dataset:
            is_wide = element["width"] > element["height"]
            self._waiting[is_wide].append(element)
            if len(self._waiting[is_wide]) == self.batch_size:
                batch, self._waiting[is_wide] = self._waiting[is_wide], []
                yield batch
