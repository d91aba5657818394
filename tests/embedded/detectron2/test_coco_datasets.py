"""Catalogs, and data sets in COCO's format."""

import copy
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import detectron2
import numpy as np
import pycocotools.mask
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import (
    convert_to_coco_json,
    load_coco_json,
    register_coco_instances,
)
from detectron2.structures import BoxMode

ROOT = Path(__file__).parents[3]
DATA = Path(__file__).parents[2] / "data" / "detectron2"
ALL_FACTS = json.loads((DATA / "facts.json").read_text())["coco_evaluator"]
FACTS = ALL_FACTS["load_coco_json"]
GROUND_TRUTH = json.loads((DATA / "coco_gt.json").read_text())
embedded_only = pytest.mark.skipif(
    "embedded" not in (detectron2.__file__ or ""), reason="the real detectron2 is active"
)


@pytest.fixture
def name(request):
    """A name that is free before and after the test."""
    name = f"test_{request.node.name}"
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def content():
    return copy.deepcopy(GROUND_TRUTH)


def write(folder, content):
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_load_like_recorded(name):
    records = load_coco_json(str(DATA / "coco_gt.json"), FACTS["image_root"], name)
    assert [record["image_id"] for record in records] == FACTS["order_of_image_ids"]
    assert records[0] == FACTS["first_record"]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == FACTS["thing_classes"]
    mapping = {str(k): v for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
    assert mapping == FACTS["thing_dataset_id_to_contiguous_id"]


def test_load_without_a_name_keeps_category_ids():
    records = load_coco_json(str(DATA / "coco_gt.json"), "images")
    found = {a["category_id"] for record in records for a in record["annotations"]}
    assert sorted(found) == FACTS["without_dataset_name_category_ids"]


def test_load_keeps_images_without_annotations():
    ids = [a["image_id"] for a in GROUND_TRUTH["annotations"]]
    for record in load_coco_json(str(DATA / "coco_gt.json"), "images"):
        assert len(record["annotations"]) == ids.count(record["image_id"])


def test_load_without_any_annotations(tmp_path, name):
    given = content()
    del given["annotations"]
    records = load_coco_json(write(tmp_path, given), "images", name)
    assert [record["annotations"] for record in records] == [[]] * 5


def test_load_extra_keys(tmp_path):
    given = content()
    given["annotations"][0]["weight"] = 0.5
    records = load_coco_json(write(tmp_path, given), "x", extra_annotation_keys=["weight"])
    weights = [a["weight"] for r in records for a in r["annotations"] if "weight" in a]
    assert weights == [0.5]


def test_load_segmentations(tmp_path, caplog):
    given = content()
    good, short = [0, 0, 4, 0, 4, 4], [0, 0, 4, 0]
    run_lengths = {"counts": [2, 4, 3], "size": [3, 3]}
    masks = [[good], [good, short], [short], run_lengths]
    image_id = given["images"][0]["id"]
    given["annotations"] = [
        {"id": i, "image_id": image_id, "category_id": 3, "bbox": [0, 0, 4, 4], "segmentation": m}
        for i, m in enumerate(masks)
    ]
    with caplog.at_level(logging.WARNING):
        records = load_coco_json(write(tmp_path, given), "x")
    found = [a["segmentation"] for record in records for a in record["annotations"]]
    assert found[:2] == [[good], [good]]
    np.testing.assert_array_equal(
        pycocotools.mask.decode(found[2]).T.ravel(), [0, 0, 1, 1, 1, 1, 0, 0, 0]
    )
    assert len(found) == 3
    assert " 1 " in caplog.text


def broken(change):
    given = content()
    change(given["annotations"])
    return given


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a[0].update(category_id=5), KeyError),
        (lambda a: a[0].update(id=a[1]["id"]), AssertionError),
        (lambda a: a[0].update(ignore=1), AssertionError),
        (lambda a: a[0].update(bbox=[]), ValueError),
    ],
    ids=["unknown category", "repeated id", "ignore", "empty box"],
)
def test_load_refuses(tmp_path, name, change, error):
    with pytest.raises(error):
        load_coco_json(write(tmp_path, broken(change)), "images", name)


def test_load_warns_of_annotations_without_image(tmp_path, caplog):
    given = broken(lambda a: a[0].update(image_id=999))
    with caplog.at_level(logging.WARNING):
        records = load_coco_json(write(tmp_path, given), "images")
    count = len(GROUND_TRUTH["annotations"])
    assert sum(len(record["annotations"]) for record in records) == count - 1
    assert str(count) in caplog.text


def test_missing_file_is_named(name, tmp_path):
    register_coco_instances(name, {}, str(tmp_path / "gone.json"), "images")
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        get_detection_dataset_dicts(name)


@embedded_only
def test_broken_file_is_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"images": [')
    with pytest.raises(json.JSONDecodeError, match=r"broken\.json is not valid json"):
        load_coco_json(str(path), "images")


def test_register_like_recorded(name):
    arguments = (name, {"extra": 1}, str(DATA / "coco_gt.json"), "images")
    register_coco_instances(*arguments)
    register_coco_instances(*arguments)
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == "coco"
    assert metadata.extra == 1
    DatasetCatalog.get(name)
    assert sorted({*metadata.as_dict()} - {"extra"}) == FACTS["metadata_keys"]
    with pytest.raises(AssertionError):
        register_coco_instances(name, {}, 3, "images")


def test_dataset_catalog(name):
    DatasetCatalog.register(name, lambda: [{"image_id": 1}])
    assert DatasetCatalog.get(name) == [{"image_id": 1}]
    assert name in DatasetCatalog.list()
    with pytest.raises(AssertionError):
        DatasetCatalog.register(name, list)
    with pytest.raises(AssertionError):
        DatasetCatalog.register(name + "_", [])
    DatasetCatalog.remove(name)
    with pytest.raises(KeyError, match="coco_2017_val"):
        DatasetCatalog.get(name)


def test_metadata(name):
    metadata = MetadataCatalog.get(name)
    assert metadata is MetadataCatalog.get(name)
    assert metadata.as_dict() == {"name": name}
    assert metadata.set(classes=["a"], number=3) is metadata
    metadata.number = 3
    with pytest.raises(AssertionError):
        metadata.number = 4
    with pytest.raises(AttributeError, match=name):
        _ = metadata.colors
    assert metadata.get("colors", 5) == 5
    assert metadata.get("classes") == ["a"]
    metadata.as_dict()["number"] = 0
    assert metadata.number == 3
    assert copy.copy(metadata).classes == ["a"]
    assert Metadata().name == "N/A"
    MetadataCatalog.remove(name)
    assert name not in MetadataCatalog.list()


def test_filter_empty_like_recorded(name):
    register_coco_instances(name, {}, str(DATA / "coco_gt.json"), "images")
    facts = ALL_FACTS["get_detection_dataset_dicts"]
    for filter_empty in (True, False):
        records = get_detection_dataset_dicts(name, filter_empty=filter_empty)
        expected = facts[f"filter_empty_{str(filter_empty).lower()}"]
        assert [record["image_id"] for record in records] == expected
    both = get_detection_dataset_dicts([name, name], filter_empty=False)
    assert len(both) == facts["list_of_two_names_length"]


def test_instances_are_counted(name, tmp_path, caplog):
    given = content()
    given["categories"][0]["name"] = "counted"  # the same table is logged only once
    register_coco_instances(name, {}, write(tmp_path, given), "images")
    with caplog.at_level(logging.INFO):
        get_detection_dataset_dicts(name)
    table = [record.message for record in caplog.records if "#instances" in record.message][-1]
    cells = [cell.strip() for cell in table.split("|")]
    objects = [a["category_id"] for a in GROUND_TRUTH["annotations"] if not a["iscrowd"]]
    for category in given["categories"]:
        count = cells[cells.index(category["name"]) + 1]
        assert int(count) == objects.count(category["id"])
    assert int(cells[cells.index("total") + 1]) == len(objects)
    # one image has no objects, four remain
    assert ["1", "4"] in [re.findall(r"\d+", record.message) for record in caplog.records]


def test_dataset_dicts_refuse(name):
    with pytest.raises(KeyError):
        get_detection_dataset_dicts("no_such_dataset")
    with pytest.raises(AssertionError):
        get_detection_dataset_dicts([])
    DatasetCatalog.register(name, list)
    with pytest.raises(AssertionError, match=name):
        get_detection_dataset_dicts(name)
    DatasetCatalog[name] = lambda: [{"image_id": 1, "annotations": []}]
    with pytest.raises(AssertionError, match=name):
        get_detection_dataset_dicts(name)
    assert len(get_detection_dataset_dicts(name, filter_empty=False)) == 1
    MetadataCatalog.get(name).thing_classes = ["a"]
    DatasetCatalog[name] = lambda: [{"annotations": [{"category_id": 1}]}]
    with pytest.raises(AssertionError, match="1"):
        get_detection_dataset_dicts(name)


def test_datasets_without_annotations_or_classes_load(name):
    DatasetCatalog.register(name, lambda: [{"file_name": "a.png"}])
    assert get_detection_dataset_dicts(name) == [{"file_name": "a.png"}]


def test_convert_and_load_again(name, tmp_path):
    records = load_coco_json(str(DATA / "coco_gt.json"), "images", name)
    DatasetCatalog.register(name, lambda: records)
    path = str(tmp_path / "out" / "converted.json")
    convert_to_coco_json(name, path)
    written = json.loads(Path(path).read_text())
    assert len({a["id"] for a in written["annotations"]}) == len(written["annotations"])
    for annotation in written["annotations"]:
        assert annotation["area"] == pytest.approx(annotation["bbox"][2] * annotation["bbox"][3])
    assert written["categories"] == GROUND_TRUTH["categories"]
    assert load_coco_json(path, "", name) == records


def test_convert_masks_and_boxes(name, tmp_path):
    square = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0], [8.0, 8.0, 10.0, 8.0, 10.0, 10.0]]
    mask = np.zeros((20, 30), np.uint8)
    mask[2:5, 3:9] = 1
    run_lengths = pycocotools.mask.encode(np.asfortranarray(mask))
    box = {"bbox": np.array([1.0, 1.0, 10.0, 10.0]), "bbox_mode": BoxMode.XYXY_ABS}
    annotations = [
        {**box, "category_id": 0, "segmentation": square},
        {**box, "category_id": 1, "segmentation": run_lengths, "iscrowd": 1},
        {**box, "category_id": 1},
    ]
    record = {"file_name": "a.png", "height": 20, "width": 30, "annotations": annotations}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    path = str(tmp_path / "converted.json")
    convert_to_coco_json(name, path)
    written = json.loads(Path(path).read_text())
    assert [a["area"] for a in written["annotations"]] == [16 + 2, 18, 81]
    assert [a["bbox"] for a in written["annotations"]] == [[1, 1, 9, 9]] * 3
    assert [a["category_id"] for a in written["annotations"]] == [0, 1, 1]
    assert written["annotations"][1]["iscrowd"] == 1
    decoded = pycocotools.mask.decode(written["annotations"][1]["segmentation"])
    np.testing.assert_array_equal(decoded, mask)


def test_convert_uses_the_cache_if_allowed(name, tmp_path):
    DatasetCatalog.register(name, lambda: [{"file_name": "a.png", "height": 2, "width": 3}])
    MetadataCatalog.get(name).thing_classes = ["a"]
    path = tmp_path / "converted.json"
    path.write_text("{}")
    convert_to_coco_json(name, str(path))
    assert path.read_text() == "{}"
    convert_to_coco_json(name, str(path), allow_cached=False)
    assert "annotations" not in json.loads(path.read_text())


def test_builtin_coco():
    metadata = MetadataCatalog.get("coco_2017_train")
    classes, mapping = metadata.thing_classes, metadata.thing_dataset_id_to_contiguous_id
    assert len(classes) == len(set(classes)) == len(metadata.thing_colors) == 80
    assert list(mapping.values()) == list(range(80))
    by_id = {category: classes[i] for category, i in mapping.items()}
    # A few of the ids in COCO's own files, around the gaps in its numbering.
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack"}
    known |= {44: "bottle", 46: "wine glass", 65: "bed", 67: "dining table", 70: "toilet"}
    known |= {72: "tv", 82: "refrigerator", 84: "book", 90: "toothbrush"}
    assert {category: by_id[category] for category in known} == known
    assert metadata.thing_colors[0] == [220, 20, 60]
    assert MetadataCatalog.get("coco_2017_val").thing_classes == classes
    names = "coco_2014_train coco_2014_val coco_2014_minival coco_2017_train coco_2017_val"
    assert set(names.split()) <= set(DatasetCatalog.list())


@embedded_only
def test_builtin_coco_is_looked_for_where_the_variable_says(tmp_path):
    code = (
        "import projects; from detectron2.data import DatasetCatalog\n"
        "try: DatasetCatalog.get('coco_2017_val')\n"
        "except FileNotFoundError as error: print(error)"
    )
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert str(tmp_path / "coco" / "annotations" / "instances_val2017.json") in shown
    assert "DETECTRON2_DATASETS" in shown
