"""DETR's dataset mapper against recorded facts."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detrex.data import DetrDatasetMapper
from PIL import Image

DATA = Path(__file__).parents[2] / "data" / "detectron2"
ALL_FACTS = json.loads((DATA / "facts.json").read_text())["transforms"]
FACTS = ALL_FACTS["DetrDatasetMapper"]
IMAGES = np.load(DATA / "images.npz")


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(IMAGES["image"]).save(path)
    return {
        "file_name": str(path),
        "image_id": 3,
        "height": 23,
        "width": 31,
        "annotations": copy.deepcopy(ALL_FACTS["annotations"]["input"]),
    }


def test_inference(record):
    before = copy.deepcopy(record)
    mapper = DetrDatasetMapper([T.ResizeShortestEdge(30, 40)], None, is_train=False)
    output = mapper(record)
    assert record == before
    assert sorted(output) == FACTS["test"]["keys"]
    assert output["image"].dtype == torch.uint8
    assert [output["height"], output["width"]] == FACTS["test"]["height_width"]
    difference = output["image"].numpy().astype(int) - IMAGES["mapper/test_image"]
    assert abs(difference).max() <= 1


def test_training(record):
    mapper = DetrDatasetMapper([T.RandomFlip(prob=1.0), T.ResizeShortestEdge(20, 26)], None)
    output = mapper(record)
    expected = FACTS["train"]
    assert sorted(output) == expected["keys"]
    difference = output["image"].numpy().astype(int) - IMAGES["mapper/train_image"]
    assert abs(difference).max() <= 1
    instances = output["instances"]
    assert list(instances.image_size) == expected["instances_image_size"]
    assert sorted(instances.get_fields()) == expected["fields"]
    torch.testing.assert_close(instances.gt_boxes.tensor, torch.tensor(expected["gt_boxes"]))
    assert instances.gt_classes.tolist() == expected["gt_classes"]


def test_training_without_objects(record):
    mapper = DetrDatasetMapper([], None)
    assert len(mapper({**record, "annotations": []})["instances"]) == 0
    only_crowd = [a for a in record["annotations"] if a["iscrowd"]]
    assert len(mapper({**record, "annotations": only_crowd})["instances"]) == 0
    del record["annotations"]
    assert sorted(mapper(record)) == FACTS["train without annotations"]["keys"]


def test_channel_order(record):
    image = {
        fmt: DetrDatasetMapper([], None, img_format=fmt)(record)["image"] for fmt in ("RGB", "BGR")
    }
    assert torch.equal(image["RGB"].flip(0), image["BGR"])


def test_choice_between_the_augmentations(record):
    mapper = DetrDatasetMapper([T.Resize((4, 4))], [T.Resize((8, 8))])
    np.random.seed(0)
    sizes = [mapper(record)["image"].shape[1] for _ in range(40)]
    np.random.seed(0)
    assert sizes == [4 if np.random.rand() > 0.5 else 8 for _ in range(40)]


def test_crop_pipeline_keeps_boxes_inside(record):
    crop = [
        T.RandomFlip(),
        T.ResizeShortestEdge([40, 60], sample_style="choice"),
        T.RandomCrop("absolute_range", (20, 40)),
        T.ResizeShortestEdge([30, 50], max_size=70, sample_style="choice"),
    ]
    mapper = DetrDatasetMapper(crop, crop)
    np.random.seed(1)
    for _ in range(30):
        output = mapper(record)
        height, width = output["instances"].image_size
        assert output["image"].shape == (3, height, width)
        boxes = output["instances"].gt_boxes
        assert (boxes.tensor >= 0).all()
        assert (boxes.tensor <= torch.tensor([width, height, width, height])).all()
        assert boxes.nonempty().all()
        assert 1 in output["instances"].gt_classes  # covers the whole image, survives any crop


def test_wrong_recorded_size(record):
    record["width"] = 30
    with pytest.raises(SizeMismatchError, match=r"image\.png"):
        DetrDatasetMapper([], None)(record)
