"""Samplers, wrapped datasets and loaders."""

import itertools
import json
import logging
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetFromList,
    MapDataset,
    ToIterableDataset,
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import IterableDataset

DATA = Path(__file__).parents[2] / "data" / "detectron2"
FACTS = json.loads((DATA / "facts.json").read_text())["loaders"]
RECORDS = [
    {"id": i, "width": 30 if i % 2 == 0 else 10, "height": 20} for i in range(6)
]  # as in the recorded facts


def first(iterable, count):
    return list(itertools.islice(iterable, count))


def ids(batches, count):
    return [[record["id"] for record in batch] for batch in first(batches, count)]


def same(record):
    return record


def in_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    # loaders import the function by name
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: world_size)


def test_training_sampler_like_recorded():
    facts = FACTS["TrainingSampler"]
    shuffled = facts["size 7, seed 42, shuffle"]
    assert first(TrainingSampler(7, seed=42), len(shuffled)) == shuffled
    ordered = facts["no shuffle"]
    assert first(TrainingSampler(7, shuffle=False, seed=0), len(ordered)) == ordered
    with pytest.raises(ValueError, match="0"):
        TrainingSampler(0)
    with pytest.raises(TypeError):
        TrainingSampler(7.0)


def test_training_sampler_starts_anew_with_each_iteration():
    sampler = TrainingSampler(7)
    assert first(sampler, 20) == first(sampler, 20)


def test_training_sampler_is_shared_out_between_processes(monkeypatch):
    whole = first(TrainingSampler(7, seed=3), 30)
    for rank in range(3):
        in_process(monkeypatch, rank, 3)
        assert first(TrainingSampler(7, seed=3), 10) == whole[rank::3]


def test_random_subset_sampler():
    seeds = {"seed_shuffle": 1, "seed_subset": 2}
    drawn = first(RandomSubsetTrainingSampler(100, 0.25, **seeds), 50)
    assert sorted(drawn[:25]) == sorted(drawn[25:])
    assert len(set(drawn)) == 25
    assert drawn[:25] != drawn[25:]
    in_order = first(RandomSubsetTrainingSampler(100, 0.25, False, **seeds), 50)
    assert in_order[:25] == in_order[25:]
    assert set(in_order) == set(drawn)
    for ratio in (0.001, 1.5):
        with pytest.raises(AssertionError):
            RandomSubsetTrainingSampler(100, ratio)


@pytest.mark.parametrize("case", FACTS["InferenceSampler_local_indices"])
def test_inference_sampler_like_recorded(monkeypatch, case):
    size, world_size = (int(part.split()[1]) for part in case.split(", "))
    for rank, expected in enumerate(FACTS["InferenceSampler_local_indices"][case]):
        in_process(monkeypatch, rank, world_size)
        sampler = InferenceSampler(size)
        assert list(sampler) == expected
        assert len(sampler) == len(expected)


def test_inference_sampler_refuses_nothing():
    with pytest.raises(AssertionError):
        InferenceSampler(0)


@pytest.mark.parametrize("serialize", [True, False, list])
def test_dataset_from_list(serialize):
    elements = [{"box": np.arange(i), "text": "x" * i} for i in range(5)]
    dataset = DatasetFromList(elements, serialize=serialize)
    assert len(dataset) == 5
    assert [element["text"] for element in (dataset[i] for i in range(5))] == [
        "", "x", "xx", "xxx", "xxxx"
    ]  # fmt: skip
    np.testing.assert_array_equal(dataset[4]["box"], np.arange(4))
    if serialize is not list:
        dataset[1]["text"] = "changed"
        assert dataset[1]["text"] == elements[1]["text"] == "x"
    with pytest.raises(IndexError):
        dataset[5]


def test_dataset_from_list_is_shared_not_copied():
    elements = [{}]
    assert DatasetFromList(elements, copy=False, serialize=False)[0] is elements[0]
    with pytest.raises(TypeError):
        DatasetFromList(elements, serialize="yes")


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(6))


def odd_only(number):
    return number * 10 if number % 2 else None


def test_map_dataset_replaces_refused_elements():
    dataset = MapDataset(DatasetFromList(list(range(6))), odd_only)
    assert len(dataset) == 6
    assert [dataset[i] for i in (1, 3, 5)] == [10, 30, 50]
    replaced = [dataset[i] for i in range(0, 6, 2) for _ in range(10)]
    assert set(replaced) <= {10, 30, 50}


def test_map_dataset_warns_and_gives_up(caplog):
    hard = MapDataset(DatasetFromList(list(range(200))), lambda n: n if n == 77 else None)
    with caplog.at_level(logging.WARNING):
        assert hard[0] == 77
    assert caplog.records
    with pytest.raises(ValueError, match=r".+"):
        MapDataset(DatasetFromList([1, 2, 3]), lambda n: None)[0]


def test_map_dataset_of_an_iterable_skips_refused_elements():
    dataset = MapDataset(Numbers(), odd_only)
    assert isinstance(dataset, IterableDataset)
    assert list(dataset) == [10, 30, 50]


def test_map_dataset_can_be_pickled():
    for wrapped in (DatasetFromList([1, 2, 3]), Numbers()):
        dataset = pickle.loads(pickle.dumps(MapDataset(wrapped, odd_only)))
        assert isinstance(dataset, IterableDataset) == isinstance(wrapped, IterableDataset)
    assert pickle.loads(pickle.dumps(MapDataset(DatasetFromList([1, 2, 3]), odd_only)))[0] == 10


def test_aspect_ratio_groups_never_mix():
    rng = np.random.RandomState(0)
    records = [{"width": w, "height": h} for w, h in rng.randint(1, 5, (101, 2))]
    batches = list(AspectRatioGroupedDataset(records, 4))
    for batch in batches:
        assert len(batch) == 4
        assert len({record["width"] > record["height"] for record in batch}) == 1
    assert 101 - 4 * len(batches) <= 6


def test_training_loader_groups_like_recorded():
    facts = FACTS["train_loader_aspect_ratio_grouping"]
    loader = build_detection_train_loader(
        RECORDS, mapper=same, sampler=TrainingSampler(6, shuffle=False), total_batch_size=2
    )
    assert ids(loader, len(facts["first_batches"])) == facts["first_batches"]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_order_does_not_depend_on_workers(workers):
    loader = build_detection_train_loader(
        RECORDS,
        mapper=same,
        sampler=TrainingSampler(6, seed=5),
        total_batch_size=2,
        aspect_ratio_grouping=False,
        num_workers=workers,
    )
    stream = first(TrainingSampler(6, seed=5), 16)
    assert list(itertools.chain(*ids(loader, 8))) == stream


def draw(record):
    return float(np.random.rand()), float(torch.rand(())), record["id"]


def test_workers_draw_different_random_numbers():
    def numbers(seed):
        loader = build_batch_data_loader(
            MapDataset(DatasetFromList(RECORDS), draw),
            TrainingSampler(6, seed=0),
            2,
            num_workers=2,
            seed=seed,
        )
        return [element[:2] for batch in first(loader, 4) for element in batch]

    drawn = numbers(1)
    assert len(set(drawn)) == len(drawn)
    assert drawn == numbers(1)
    assert drawn != numbers(2)


def test_training_loader_shares_the_batch_out(monkeypatch):
    for rank in range(2):
        in_process(monkeypatch, rank, 2)
        loader = build_detection_train_loader(
            RECORDS,
            mapper=same,
            sampler=TrainingSampler(6, shuffle=False, seed=0),
            total_batch_size=4,
            aspect_ratio_grouping=False,
        )
        stream = [index % 6 for index in range(rank, 100, 2)]
        assert ids(loader, 3) == [stream[0:2], stream[2:4], stream[4:6]]


def test_training_loader_refuses(monkeypatch):
    def build(dataset=RECORDS, **kwargs):
        return build_detection_train_loader(dataset, mapper=same, **kwargs)

    with pytest.raises(AssertionError):
        build(total_batch_size=0)
    with pytest.raises(AssertionError):
        build(total_batch_size=2, drop_last=False)
    with pytest.raises(AssertionError):
        build(total_batch_size=2, sampler=[0, 1])
    with pytest.raises(AssertionError):
        build(Numbers(), total_batch_size=2, sampler=TrainingSampler(6))
    with pytest.raises(ValueError, match=r"."):
        build(total_batch_size=2, single_gpu_batch_size=2)
    with pytest.raises(ValueError, match=r"."):
        build([], total_batch_size=2)
    in_process(monkeypatch, 0, 4)
    with pytest.raises(AssertionError, match="6"):
        build(total_batch_size=6, sampler=TrainingSampler(6, seed=0))


def test_training_loader_of_an_iterable_dataset():
    loader = build_detection_train_loader(
        Numbers(), mapper=odd_only, total_batch_size=2, aspect_ratio_grouping=False
    )
    assert list(loader) == [[10, 30]]


def test_collate_functions():
    kwargs = {"mapper": same, "collate_fn": len, "total_batch_size": 3}
    for grouping in (True, False):
        loader = build_detection_train_loader(RECORDS, aspect_ratio_grouping=grouping, **kwargs)
        assert first(loader, 2) == [3, 3]
    single = build_batch_data_loader(
        DatasetFromList(RECORDS), TrainingSampler(6), 0, single_gpu_batch_size=3, drop_last=False
    )
    assert len(next(iter(single))) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_inference_loader_like_recorded(workers):
    facts = FACTS["test_loader"]
    loader = build_detection_test_loader(RECORDS, mapper=same, num_workers=workers)
    assert ids(loader, 99) == facts["batches"]
    assert len(loader) == facts["len"]
    larger = build_detection_test_loader(RECORDS, mapper=same, batch_size=4, num_workers=workers)
    assert ids(larger, 99) == facts["batch_size_4"]


def test_inference_loaders_of_all_processes_cover_everything(monkeypatch):
    seen = Counter()
    for rank in range(4):
        in_process(monkeypatch, rank, 4)
        loader = build_detection_test_loader(RECORDS, mapper=same, batch_size=2)
        seen.update(record["id"] for batch in loader for record in batch)
    assert seen == Counter(range(6))


def test_to_iterable_dataset_with_an_own_sharding_sampler():
    dataset = ToIterableDataset(
        DatasetFromList(list("abc")), InferenceSampler(3), shard_sampler=False
    )
    assert list(dataset) == list("abc")
    assert len(dataset) == 3
    with pytest.raises(AssertionError):
        ToIterableDataset(Numbers(), InferenceSampler(3))
