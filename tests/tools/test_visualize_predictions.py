import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from engine.errors import UserError
from tools import visualize_predictions as vis


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "images").mkdir()
    images = []
    for i in range(6):
        name = f"{i}.png"
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / name)
        images.append({"id": 10 + i, "file_name": name, "width": 40, "height": 30})
    truth = [
        {"id": 1, "image_id": 10, "category_id": 7, "bbox": [4, 5, 10, 8], "iscrowd": 0},
        {"id": 2, "image_id": 11, "category_id": 7, "bbox": [4, 5, 10, 8], "iscrowd": 1},
    ]
    content = {"images": images, "annotations": truth, "categories": [{"id": 7, "name": "cat"}]}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    found = [
        {"image_id": 12, "category_id": 7, "bbox": [20, 15, 12, 10], "score": 0.9},
        {"image_id": 13, "category_id": 7, "bbox": [20, 15, 12, 10], "score": 0.2},
    ]
    (tmp_path / "coco_instances_results.json").write_text(json.dumps(found))
    register_coco_instances("drawn", {}, str(tmp_path / "gt.json"), str(tmp_path / "images"))
    yield tmp_path
    DatasetCatalog.remove("drawn")
    MetadataCatalog.remove("drawn")


def count(picture: Image.Image, colour: tuple) -> int:
    return int((np.asarray(picture) == colour).all(axis=2).sum())


def test_boxes_lie_where_they_should_in_an_enlarged_image():
    tile = vis.draw_tile(
        Image.new("RGB", (40, 30)),
        [],
        [{"category_id": 1, "bbox": [20, 15, 12, 10], "score": 0.9}],
        {1: "x"},
    )
    assert tile.size == (320, 240)  # eight times
    drawn = (np.asarray(tile) == vis.PREDICTION).all(axis=2)
    lower = drawn[15 * 8 + 2 :]  # below the label
    columns, rows = np.flatnonzero(lower.any(0)), np.flatnonzero(drawn.any(1))
    assert (columns[0], columns[-1]) == (160, 32 * 8 - 1)
    assert rows[-1] == 25 * 8 - 1
    assert not drawn[18 * 8, 21 * 8 : 31 * 8].any()  # hollow


def test_large_images_shrink():
    assert vis.Tile(Image.new("L", (1000, 500))).image.size == (320, 160)


def test_truth_crowds_and_predictions_differ_in_colour(dataset):
    tiles = {}
    for first in range(4):
        record = json.loads((dataset / "gt.json").read_text())["images"][first]
        truth = [
            a
            for a in json.loads((dataset / "gt.json").read_text())["annotations"]
            if a["image_id"] == record["id"]
        ]
        tiles[record["id"]] = vis.draw_tile(Image.new("RGB", (40, 30)), truth, [], {7: "cat"})
    assert count(tiles[10], vis.TRUTH) > 100
    assert count(tiles[10], vis.CROWD) == 0 < count(tiles[11], vis.CROWD)
    assert count(tiles[12], vis.TRUTH) == 0


def test_draws_a_data_set_by_name(dataset):
    arguments = ["--output-dir", str(dataset), "--dataset", "drawn", "--columns", "3"]
    vis.main(arguments)
    with Image.open(dataset / "predictions.png") as picture:
        assert picture.size == (3 * (320 + vis.GAP) + vis.GAP, 2 * (240 + vis.GAP) + 24 + vis.GAP)
        confident = count(picture, vis.PREDICTION)
    vis.main([*arguments, "--threshold", "0.1"])
    with Image.open(dataset / "predictions.png") as picture:
        assert count(picture, vis.PREDICTION) > 1.5 * confident > 0


def test_newest_results_count(tmp_path):
    (tmp_path / "inference").mkdir()
    import os

    for folder, age in ((tmp_path, 100), (tmp_path / "inference", 200)):
        (folder / vis.RESULTS).write_text("[]")
        os.utime(folder / vis.RESULTS, (age, age))
    assert vis.find_results(tmp_path).parent.name == "inference"


def test_spread_covers_the_list():
    assert vis.spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert vis.spread([1, 2], 5) == [1, 2]


def test_errors_are_one_line(dataset, tmp_path_factory):
    with pytest.raises(UserError, match=r"nonsense is not one of .*drawn"):
        vis.main(["--output-dir", str(dataset), "--dataset", "nonsense"])
    with pytest.raises(UserError, match="evaluate first"):
        vis.main(["--output-dir", str(tmp_path_factory.mktemp("none")), "--dataset", "drawn"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is no json"),
        ("{}", "holds a dict, expected a list of predictions"),
        ("[1]", "prediction 0 is 1, expected image_id"),
        ('[{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": null}]', "and a score"),
        ('[{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3], "score": 1}]', "a bbox of 4 numb"),
        ('[{"image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 1}]', "category_id 9"),
    ],
)
def test_predictions_that_cannot_be_drawn_are_named(dataset, text, message):
    path = vis.find_results(dataset)
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        vis.main(["--output-dir", str(dataset), "--dataset", "drawn"])
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_missing_config_is_named(dataset):
    arguments = ["--output-dir", str(dataset), "--dataset", "drawn"]
    with pytest.raises(UserError, match=r"config file nothing\.py not found"):
        vis.main([*arguments, "--config-file", "nothing.py"])
