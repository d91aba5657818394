from pathlib import Path

import pytest
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detrex.config import get_config
from omegaconf import OmegaConf

from engine.data import ResumableTrainLoader, build_resumable_train_loader
from engine.registration import register_shapes
from tools.make_shapes import generate
from tools.shapes_scene import Settings

DATA = Path(__file__).resolve().parents[2] / "configs" / "common" / "data"


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    generate(Settings(train_images=9, val_images=5, size=(48, 64)), tmp_path / "shapes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield LazyConfig.load(str(DATA / "shapes.py")).dataloader
    monkeypatch.undo()
    register_shapes()


def test_shapes_are_loaded_for_training(shapes):
    shapes.train.total_batch_size = 4
    loader = instantiate(shapes.train)
    assert isinstance(loader, ResumableTrainLoader)
    batch = next(iter(loader))
    assert [tuple(sample["image"].shape) for sample in batch] == [(3, 48, 64)] * 4
    assert all(sample["instances"].image_size == (48, 64) for sample in batch)
    assert sum(len(sample["instances"]) for sample in batch) > 0


def test_shapes_are_loaded_for_evaluation(shapes):
    samples = [sample for batch in instantiate(shapes.test) for sample in batch]
    assert [sample["image_id"] for sample in samples] == [1, 2, 3, 4, 5]  # empty images too
    assert shapes.evaluator.dataset_name == "shapes_val"
    assert len(MetadataCatalog.get("shapes_val").thing_classes) == 10
    instantiate(shapes.evaluator)


def test_coco_differs_from_detrex_in_the_train_loader_only():
    ours = LazyConfig.load(str(DATA / "coco_detr.py")).dataloader
    theirs = get_config("common/data/coco_detr.py").dataloader
    assert ours.train._target_ is build_resumable_train_loader
    ours.train._target_ = theirs.train._target_
    assert OmegaConf.to_container(ours) == OmegaConf.to_container(theirs)


@pytest.mark.parametrize("name", ["shapes", "coco_detr"])
def test_configs_survive_being_saved(name, tmp_path):
    config = LazyConfig.load(str(DATA / f"{name}.py"))
    LazyConfig.save(OmegaConf.create({"dataloader": config.dataloader}), str(tmp_path / "c.yaml"))
    loaded = LazyConfig.load(str(tmp_path / "c.yaml"))
    assert loaded.dataloader.train._target_ == "engine.data.build_resumable_train_loader"
