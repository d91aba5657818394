import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from engine.registration import register_shapes
from tools.make_shapes import generate
from tools.shapes_scene import Settings


@pytest.fixture(autouse=True)
def leave_the_catalogs_as_they_were(monkeypatch):
    yield
    monkeypatch.undo()
    register_shapes()


def test_registering_twice_is_the_same_as_once(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_shapes()
    register_shapes()
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.json_file == str(tmp_path / "shapes" / "annotations" / "instances_val.json")
    assert metadata.image_root == str(tmp_path / "shapes" / "val")
    assert metadata.evaluator_type == "coco"


def test_another_root_replaces_the_first(tmp_path):
    register_shapes(tmp_path / "a")
    register_shapes(tmp_path / "b")
    assert str(tmp_path / "b") in MetadataCatalog.get("shapes_train").json_file


def test_registered_data_has_the_generated_content(tmp_path):
    generate(Settings(train_images=6, val_images=4, categories=9, crowd_share=1.0), tmp_path / "s")
    register_shapes(tmp_path / "s")
    records = DatasetCatalog.get("shapes_train")
    content = json.loads((tmp_path / "s" / "annotations" / "instances_train.json").read_text())
    assert MetadataCatalog.get("shapes_train").thing_classes == [
        category["name"] for category in content["categories"]
    ]
    assert len(records) == 6
    boxes = [a["bbox"] for r in records for a in r["annotations"]]
    assert boxes == [a["bbox"] for a in content["annotations"]]
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(9))
    assert any(a["iscrowd"] for r in records for a in r["annotations"])


def test_sets_beside_the_first_have_their_folders_names(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(Settings(train_images=2, val_images=1), tmp_path / "shapes_more")
    (tmp_path / "shapes_not_drawn").mkdir()
    register_shapes()
    assert len(DatasetCatalog.get("shapes_more_train")) == 2
    assert MetadataCatalog.get("shapes_more_val").image_root == str(tmp_path / "shapes_more/val")
    assert "shapes_not_drawn_train" not in DatasetCatalog.list()
    for split in ("train", "val"):
        DatasetCatalog.remove(f"shapes_more_{split}")
        MetadataCatalog.remove(f"shapes_more_{split}")
