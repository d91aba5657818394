"""The training stream: a function of the seed, cut and shared out."""

import copy
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detrex.data import DetrDatasetMapper
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.boxes import drop_bad_boxes, float_boxes
from engine.data import BatchStream, build_resumable_train_loader, image_fault
from engine.datasets import build_loader
from engine.errors import UserError
from engine.rng import get_rng_state, preserve_rng, seed_cpu, set_rng_state


def take(iterable, count):
    return list(itertools.islice(iterable, count))


streams = st.builds(
    BatchStream,
    st.lists(st.integers(0, 1), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(0, 2**31),
)


@given(streams, st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_starting_later_gives_the_same_batches(stream, start):
    assert take(stream.batches(start), 10) == take(stream.batches(), start + 10)[start:]


@given(streams)
@settings(max_examples=60, deadline=None)
def test_batches_are_uniform_and_positions_unique(stream):
    batches = take(stream.batches(), 20)
    assert all(len({stream.groups[index] for _, index in batch}) == 1 for batch in batches)
    assert all(len(batch) == stream.total_batch_size for batch in batches)
    positions = [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == len(positions)


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_epoch_is_a_shuffle(size, batch, seed):
    keys = [key for b in take(BatchStream([0] * size, batch, seed).batches(), 30) for key in b]
    assert [position for position, _ in keys] == list(range(len(keys)))
    for epoch in range(len(keys) // size):
        indices = [index for _, index in keys[epoch * size : (epoch + 1) * size]]
        assert sorted(indices) == list(range(size))


def test_order_is_that_of_detectron2s_sampler():
    from detectron2.data.samplers import TrainingSampler

    ours = [i for b in take(BatchStream([0] * 10, 3, 5).batches(), 20) for _, i in b]
    assert ours == take(TrainingSampler(10, seed=5), 60)


RECORDS = [
    {"width": 4 + i % 2, "height": 5, "image_id": i, "file_name": f"{i}.png"} for i in range(9)
]


def noisy(record):
    draws = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**record, "draws": draws}


def make_loader(**options):
    options = {"mapper": noisy, "total_batch_size": 4, "seed": 3, **options}
    return build_resumable_train_loader(RECORDS, **options)


def test_samples_do_not_depend_on_workers_or_start():
    expected = take(make_loader(), 8)
    assert take(make_loader(num_workers=2), 8) == expected
    loader = make_loader()
    loader.seek(5)
    assert take(loader, 3) == expected[5:]
    draws = [sample["draws"] for batch in expected for sample in batch]
    assert len(set(draws)) == len(draws)


def test_processes_share_each_batch(monkeypatch):
    whole = take(make_loader(), 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(take(make_loader(), 6))
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_loading_leaves_the_global_generators_alone():
    before = get_rng_state()
    take(make_loader(), 5)
    after = get_rng_state()
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert torch.equal(before["torch"], after["torch"])


def test_rng_state_survives_a_file(tmp_path):
    def draw():
        return random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist()

    draw()  # leaves numpy and python with half of a pair of normal numbers
    torch.save(get_rng_state(), tmp_path / "rng.pth")
    expected = draw()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draw() == expected


def test_preserve_and_seed():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def drawn(*entropy):
        with preserve_rng(cuda=False):
            seed_cpu(*entropy)
            return draw()

    seed_cpu(1, 2)
    first, second = draw(), draw()
    seed_cpu(1, 2)
    assert first == draw()
    assert drawn(1, 2) == first
    assert all(a != b for a, b in zip(drawn(1, 3), first, strict=True))
    assert second == draw()  # as if nothing had been drawn in between


def test_a_batch_holds_the_samples_that_single_ones_are():
    def mapper(record):
        return record["width"], random.random(), np.random.rand(), torch.rand(()).item()

    samples = make_loader(mapper=mapper).samples
    keys = [(7, 2), (0, 0), (3, 2)]
    before = torch.get_rng_state()
    together = samples.__getitems__(keys)
    assert together == [samples[key] for key in keys]
    assert len({sample for sample, _ in together}) == 3  # each with its own numbers
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_must_divide(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="total_batch_size is 4, expected a positive multiple of"):
        make_loader()


def test_other_samplers_and_empty_data_are_refused():
    with pytest.raises(UserError, match="remove 'sampler'"):
        make_loader(sampler=object())
    with pytest.raises(UserError, match="holds no image"):
        build_resumable_train_loader([], mapper=noisy, total_batch_size=1)


@pytest.fixture
def image_records(tiny_data, tmp_path):
    records = []
    for index, path in enumerate(sorted(tiny_data.glob("*.png"))):
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        records.append({"file_name": str(copy), "width": 2, "height": 1, "image_id": index})
    return records


def read(record):
    from detectron2.data.detection_utils import read_image

    read_image(record["file_name"], format="RGB")
    return record["image_id"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_is_replaced_with_one_warning(image_records, workers, engine_log):
    def run():
        loader = build_resumable_train_loader(
            image_records, mapper=read, total_batch_size=4, seed=1, num_workers=workers
        )
        return [index for batch in take(loader, 9) for index in batch]

    whole = run()
    broken = Path(image_records[4]["file_name"])
    broken.write_bytes(broken.read_bytes()[:60])
    assert run() == [5 if index == 4 else index for index in whole]
    assert engine_log.text.count(f"cannot decode image {broken}") == 1


def test_other_errors_of_the_mapper_are_not_hidden(image_records):
    def faulty(record):
        raise OSError("disk on fire")

    loader = build_resumable_train_loader(image_records, mapper=faulty, total_batch_size=1, seed=0)
    with pytest.raises(OSError, match="disk on fire"):
        next(iter(loader))


def test_image_fault(image_records, tmp_path):
    path = Path(image_records[0]["file_name"])
    assert image_fault(str(path)) == ""
    absent = str(tmp_path / "absent.png")
    assert image_fault(absent) == f"image {absent} not found"
    path.write_bytes(b"not an image")
    assert image_fault(str(path)) == f"cannot decode image {path}"


def test_bad_boxes_are_dropped_and_counted(engine_log):
    def annotation(*box):
        return {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}

    good = [annotation(0, 0, 1, 1), annotation(-3, 2, 4, 4), annotation(9, 7, 5, 5)]
    bad = [
        annotation(1, 1, 0, 3),
        annotation(1, 1, 3, -1),
        annotation(10, 0, 2, 2),
        annotation(-4, 0, 4, 4),
        annotation(0, 8, 4, 4),
        annotation(float("nan"), 0, 1, 1),
    ]
    records = [{"width": 10, "height": 8, "annotations": good + bad}, {"width": 1, "height": 1}]
    cleaned = drop_bad_boxes(records)
    assert cleaned[0]["annotations"] == good
    assert cleaned[1] == records[1]
    assert len(records[0]["annotations"]) == 9, "the data set itself must stay"
    assert "dropped 3 boxes of non-positive size and 3 outside their image" in engine_log.text


def integer_boxes(folder):
    """A dataset dict of two objects, the second one a crowd, as a COCO file may state them."""
    Image.new("RGB", (60, 40)).save(folder / "image.png")
    shared = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    return {
        "file_name": str(folder / "image.png"),
        "width": 60,
        "height": 40,
        "annotations": [
            {"bbox": [3, 5, 20, 10], "iscrowd": 0, **shared},
            {"bbox": [0, 0, 9, 9], "iscrowd": 1, **shared},
        ],
    }


@pytest.mark.parametrize("train", [True, False])
def test_integer_boxes_are_transformed_as_floats(tmp_path, train):
    record = integer_boxes(tmp_path)
    before = copy.deepcopy(record)
    mapper = LazyCall(DetrDatasetMapper)(
        augmentation=[LazyCall(T.ResizeShortestEdge)(short_edge_length=60, max_size=100)],
        augmentation_with_crop=None,
        is_train=True,
    )
    if train:
        loader = build_resumable_train_loader(
            [record], mapper=instantiate(mapper), total_batch_size=1
        )
    else:
        loader = build_loader(
            LazyCall(build_detection_test_loader)(dataset=[record], mapper=mapper)
        )
    found = next(iter(loader))[0]["instances"]
    assert found.image_size == (60, 90)
    expected = torch.tensor([[4.5, 7.5, 34.5, 22.5]])
    torch.testing.assert_close(found.gt_boxes.tensor, expected)
    assert record == before, "the data set itself must stay"


def test_records_of_float_boxes_are_not_copied(tmp_path):
    record = float_boxes(integer_boxes(tmp_path))
    assert float_boxes(record) is record
    assert float_boxes(RECORDS[0]) is RECORDS[0]
