"""From the names of data sets to loaders for training and inference."""

import itertools
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from termcolor import colored
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from detectron2.utils.comm import get_world_size
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import log_first_n

from ._table import pair_table
from .catalog import DatasetCatalog, MetadataCatalog
from .common import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from .detection_utils import check_metadata_consistency
from .samplers import InferenceSampler, TrainingSampler

__all__ = [
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "get_detection_dataset_dicts",
    "print_instances_class_histogram",
]

logger = logging.getLogger(__name__)


def get_detection_dataset_dicts(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    check_consistency: bool = True,
) -> list[dict]:
    """Load data sets and join their records.

    Args:
        names: of one or more registered data sets.
        filter_empty: drop images that have no annotation, or only those of crowds.
        min_keypoints: must stay 0.
        proposal_files: must stay None.
        check_consistency: require equal class names, and log how many objects each class has.

    Raises:
        KeyError: for an unknown name.
        AssertionError: if a data set is empty, or nothing is left of them.
        ValueError: if their class names differ.
    """
    if min_keypoints or proposal_files is not None:
        raise NotImplementedError(
            "min_keypoints and proposal_files need the real detectron2; its subset handles boxes"
        )
    names = [names] if isinstance(names, str) else list(names)
    assert names, "no data set named"
    loaded = {name: DatasetCatalog.get(name) for name in names}
    for name, dicts in loaded.items():
        assert len(dicts) > 0, f"data set {name!r} is empty"
    records = list(itertools.chain.from_iterable(loaded[name] for name in names))

    if "annotations" in records[0]:
        if filter_empty:
            records = filter_images_with_only_crowd_annotations(records)
        if check_consistency and all("thing_classes" in _metadata(name) for name in names):
            check_metadata_consistency("thing_classes", names)
            print_instances_class_histogram(records, _metadata(names[0])["thing_classes"])
    assert records, f"no image with annotations in {', '.join(names)}"
    return records


def _metadata(name: str) -> dict[str, Any]:
    return MetadataCatalog.get(name).as_dict()


def filter_images_with_only_crowd_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Return the records with at least one annotation that is not of a crowd."""
    kept = [
        record
        for record in dataset_dicts
        if any(not annotation.get("iscrowd", 0) for annotation in record["annotations"])
    ]
    logger.info(
        "Left out %d images that have no objects; %d remain.",
        len(dataset_dicts) - len(kept),
        len(kept),
    )
    return kept


def print_instances_class_histogram(
    dataset_dicts: Sequence[dict], class_names: Sequence[str]
) -> None:
    """Log how many objects, crowds aside, each class has.

    Raises:
        AssertionError: for a class outside of ``class_names``.
    """
    counts = [0] * len(class_names)
    for record in dataset_dicts:
        for annotation in record["annotations"]:
            if not annotation.get("iscrowd", 0):
                category = annotation["category_id"]
                assert 0 <= category < len(counts), (
                    f"category_id {category} in {record.get('file_name')}, "
                    f"expected 0 to {len(counts) - 1}"
                )
                counts[category] += 1
    pairs = [(_shorten(name), count) for name, count in zip(class_names, counts, strict=True)]
    if len(pairs) > 1:
        pairs.append(("total", sum(counts)))
    table = pair_table(pairs, ("category", "#instances"))
    log_first_n(
        logging.INFO,
        f"Objects in each of {len(class_names)} categories:\n" + colored(table, "cyan"),
        key="message",
    )


def _shorten(name: str, limit: int = 13) -> str:
    return name if len(name) <= limit else name[: limit - 2] + ".."


def build_detection_train_loader(
    dataset: list | Dataset,
    *,
    mapper: Callable[[dict], Any] | None,
    sampler: Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
    **kwargs: Any,
) -> Iterable[list]:
    """Build an endless loader of training batches.

    Args:
        dataset: records, or a dataset of them.
        mapper: from a record to what the model takes; may return None to skip it.
        sampler: of a map-style dataset, :class:`TrainingSampler` if None.
        total_batch_size: images per batch over all processes.
        aspect_ratio_grouping: batch wide images apart from others; elements then need "width" and
            "height".
        num_workers: processes that load data, per process that trains.
        collate_fn: joins the elements of a batch; by default they stay a list.
        kwargs: for :func:`build_batch_data_loader`.
    """
    mapped = _mapped(dataset, mapper)
    if sampler is None and not isinstance(mapped, IterableDataset):
        sampler = TrainingSampler(len(mapped))  # type: ignore[arg-type]
    return build_batch_data_loader(
        mapped,
        sampler,
        total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        **kwargs,
    )


def build_batch_data_loader(
    dataset: Dataset,
    sampler: Sampler | None,
    total_batch_size: int,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    prefetch_factor: int = 2,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Iterable[list]:
    """Build a loader of batches, lists of elements unless ``collate_fn`` makes something of them.

    Args:
        dataset: map-style with a sampler, or iterable without.
        sampler: of the dataset's indices.
        total_batch_size: elements per batch over all processes, a multiple of their number.
        aspect_ratio_grouping: see :func:`build_detection_train_loader`.
        num_workers: processes that load data.
        collate_fn: joins the elements of a batch.
        drop_last: drop an incomplete last batch; needed for ``aspect_ratio_grouping``.
        single_gpu_batch_size: elements per batch of this process, in place of
            ``total_batch_size``, which must then be 0 or None.
        prefetch_factor: batches that each worker prepares ahead.
        persistent_workers: keep the workers from one iteration to the next.
        pin_memory: load into page-locked memory.
        seed: of the workers' random numbers.
        kwargs: for :class:`torch.utils.data.DataLoader`.
    """
    batch_size = _batch_size_here(total_batch_size, single_gpu_batch_size)
    logger.info("Batches of this process have %d images", batch_size)
    if isinstance(dataset, IterableDataset):
        assert sampler is None, "an iterable dataset takes no sampler"
    else:
        assert isinstance(sampler, Sampler), f"expected a sampler, found {type(sampler)}"
        dataset = ToIterableDataset(dataset, sampler, shard_chunk_size=batch_size)
    options = dict(
        num_workers=num_workers,
        worker_init_fn=worker_init_reset_seed,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers,
        pin_memory=pin_memory,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        **kwargs,
    )
    if not aspect_ratio_grouping:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            drop_last=drop_last,
            collate_fn=collate_fn or trivial_batch_collator,
            **options,
        )
    assert drop_last, "aspect_ratio_grouping always drops incomplete batches, found drop_last=False"
    elements = DataLoader(dataset, collate_fn=operator.itemgetter(0), **options)
    batches = AspectRatioGroupedDataset(elements, batch_size)
    if collate_fn is not None:
        batches = MapDataset(batches, collate_fn)  # type: ignore[assignment]
    return batches


def build_detection_test_loader(
    dataset: list | Dataset,
    *,
    mapper: Callable[[dict], Any],
    sampler: Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
) -> DataLoader:
    """Build a loader that gives every element once, shared out between the processes.

    Args:
        dataset: records, or a dataset of them.
        mapper: from a record to what the model takes.
        sampler: of a map-style dataset, :class:`InferenceSampler` if None.
        batch_size: elements per batch; the last one may be smaller.
        num_workers: processes that load data.
        collate_fn: joins the elements of a batch; by default they stay a list.
    """
    mapped = _mapped(dataset, mapper)
    if isinstance(mapped, IterableDataset):
        assert sampler is None, "an iterable dataset takes no sampler"
    elif sampler is None:
        sampler = InferenceSampler(len(mapped))  # type: ignore[arg-type]
    return DataLoader(
        mapped,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
    )


def _mapped(dataset: list | Dataset, mapper: Callable[[dict], Any] | None) -> Dataset:
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    return dataset if mapper is None else MapDataset(dataset, mapper)


def _batch_size_here(total: int, single: int | None) -> int:
    if single:
        if total:
            raise ValueError(
                f"total_batch_size {total} and single_gpu_batch_size {single} exclude each other"
            )
        return single
    processes = get_world_size()
    assert total > 0, f"total_batch_size must be positive, found {total}"
    assert total % processes == 0, (
        f"total_batch_size must be a multiple of the {processes} processes, found {total}"
    )
    return total // processes


def trivial_batch_collator(batch: list) -> list:
    """Return the batch as it is."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed all random number generators of a loader's worker, differently in each."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
