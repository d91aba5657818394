"""Samplers for training without end and for inference without repetition, on any process count."""

import itertools
import logging
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from detectron2.utils import comm

__all__ = ["InferenceSampler", "RandomSubsetTrainingSampler", "TrainingSampler"]

logger = logging.getLogger(__name__)


def _check_size(size: int) -> None:
    if not isinstance(size, int):
        raise TypeError(f"the size of a data set is an int, found {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"cannot sample from a data set of size {size}")


def _common_seed(seed: int | None) -> int:
    """The seed given, or a random one on which all processes agree."""
    return int(comm.shared_random_seed() if seed is None else seed)


class TrainingSampler(Sampler):
    """An endless stream of indices: one permutation of the data set after the other.

    All processes draw the same stream from the same seed, and process r of n yields its elements
    r, r + n, r + 2n, ...
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None):
        """Sample from ``size`` elements.

        Args:
            size: number of elements; TypeError unless an int, ValueError unless positive.
            shuffle: permute the elements anew each time, or keep their order.
            seed: of the permutations; if None, all processes agree on a random one.
        """
        _check_size(size)
        self._size, self._shuffle, self._seed = size, shuffle, _common_seed(seed)
        self._share = slice(comm.get_rank(), None, comm.get_world_size())

    def __iter__(self) -> Iterator[int]:
        """Yield this process's share of the stream."""
        share = self._share
        return itertools.islice(self._stream(), share.start, share.stop, share.step)

    def _elements(self) -> torch.Tensor:
        return torch.arange(self._size)

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        elements = self._elements()
        while True:
            if self._shuffle:
                order = torch.randperm(len(elements), generator=generator)
                yield from elements[order].tolist()
            else:
                yield from elements.tolist()


class RandomSubsetTrainingSampler(TrainingSampler):
    """A :class:`TrainingSampler` over a random part of the data set."""

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ):
        """Sample from ``int(size * subset_ratio)`` elements chosen with ``seed_subset``."""
        super().__init__(size, shuffle, seed_shuffle)
        count = int(size * subset_ratio)
        assert 0 < count <= size, f"a subset of {subset_ratio} of {size} elements has {count}"
        generator = torch.Generator().manual_seed(_common_seed(seed_subset))
        everything = torch.randperm(size, generator=generator)
        self._subset = everything[:count]
        logger.info("Sampling from a random subset of %d of %d elements", count, size)

    def _elements(self) -> torch.Tensor:
        return self._subset


class InferenceSampler(Sampler):
    """Every index exactly once; each process gets a contiguous share, the first ones one more."""

    def __init__(self, size: int):
        """Share out ``size`` indices; AssertionError unless positive."""
        assert size > 0, f"cannot run inference on a data set of size {size}"
        share, left_over = divmod(size, comm.get_world_size())
        rank = comm.get_rank()
        begin = rank * share + min(rank, left_over)
        self._indices = range(begin, begin + share + (rank < left_over))

    def __iter__(self) -> Iterator[int]:
        """Yield this process's indices."""
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
