"""What may be wrong with data sets and settings is said in one line, before any work."""

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from tiny_run import metrics, run_tiny

from engine.errors import PATIENCE, LocalError, UserError, exit_code_of
from engine.processes import run_in_processes, started_by_torchrun
from engine.settings import resolve_device


@pytest.fixture
def own_data(tiny_data, tmp_path):
    """A copy of the tiny data that a test may spoil, registered as ``spoilt``."""
    folder = tmp_path / "images"
    shutil.copytree(tiny_data, folder)
    register_coco_instances("spoilt", {}, str(folder / "instances.json"), str(folder))
    yield folder
    DatasetCatalog.remove("spoilt")
    MetadataCatalog.remove("spoilt")


def edit(folder, change):
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def use(name):
    return [f"dataloader.{part}.dataset.names={name}" for part in ("train", "test")]


def fails(tmp_path, *overrides, **options):
    with pytest.raises(UserError) as caught:
        run_tiny(tmp_path / "out", *overrides, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_name(tmp_path):
    message = fails(tmp_path, "dataloader.train.dataset.names=tiny_trian")
    assert message == "data set 'tiny_trian' is not registered (did you mean 'tiny_train'?)"


@pytest.mark.parametrize("what", ["annotation file", "image folder"])
def test_missing_files(own_data, tmp_path, what, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/some/where")
    metadata = MetadataCatalog.get("spoilt")
    if what == "annotation file":
        path = metadata.json_file
        Path(path).unlink()
    else:
        path = metadata.image_root
        shutil.rmtree(path)
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "instances.json").write_text("{}")
        shutil.move(tmp_path / "images", tmp_path / "elsewhere")
        metadata_json = str(tmp_path / "elsewhere" / "instances.json")
        DatasetCatalog.remove("spoilt")
        MetadataCatalog.remove("spoilt")
        register_coco_instances("spoilt", {}, metadata_json, path)
    message = fails(tmp_path, *use("spoilt"))
    assert message.startswith(f"{what} {path} of data set 'spoilt' not found; set DETECTRON2_DATA")
    assert "/some/where" in message


def test_unlisted_category(own_data, tmp_path):
    edit(own_data, lambda c: c["annotations"][3].update(category_id=77))
    assert fails(tmp_path, *use("spoilt")) == (
        f"{own_data}/instances.json: annotation 4 has category_id 77, "
        "which is not listed in 'categories'"
    )


def test_not_an_annotation_file(own_data, tmp_path):
    (own_data / "instances.json").write_text('{"images": [')
    message = fails(tmp_path, *use("spoilt"))
    assert message.startswith(f"{own_data}/instances.json is not a COCO annotation file: ")


def test_another_image_size_than_stated(own_data, tmp_path):
    edit(own_data, lambda c: [image.update(width=99, height=98) for image in c["images"]])
    message = fails(tmp_path, *use("spoilt"))
    assert str(own_data) in message
    assert ".png" in message
    assert "(99, 98)" in message


def test_what_else_prevents_loading(own_data, tmp_path):
    edit(own_data, lambda c: c["annotations"][2].update(id=2))
    message = fails(tmp_path, *use("spoilt"))
    assert message.startswith("cannot load data set spoilt: AssertionError: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: c["images"][2].pop("file_name"),
            ": image 3 has the file_name None, expected a n",
        ),
        (lambda c: c["images"][2].pop("height"), ": image 3 has the height None, expected pixels"),
        (
            lambda c: c["images"][2].update(height="24"),
            ": image 3 has the height '24', expected pix",
        ),
        (
            lambda c: c["annotations"][2].pop("bbox"),
            ": annotation 3 has the bbox None, expected 4 n",
        ),
        (
            lambda c: c["annotations"][2].update(bbox=None),
            ": annotation 3 has the bbox None, expecte",
        ),
        (
            lambda c: c["annotations"][2].update(bbox=[1, 2]),
            ": annotation 3 has a bbox of 2 numbers",
        ),
        (
            lambda c: c.update(images=None),
            " is not a COCO annotation file: 'images' is of type None",
        ),
        (
            lambda c: c.pop("categories"),
            " is not a COCO annotation file: 'categories' is missing, ",
        ),
    ],
)
def test_entries_that_cannot_be_used_are_named(own_data, tmp_path, change, reason):
    edit(own_data, change)
    assert fails(tmp_path, *use("spoilt")).startswith(f"{own_data}/instances.json{reason}")


@pytest.mark.parametrize("eval_only", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.pop("area"), "the area None, which evaluation needs: expected the object's"),
        (lambda a: a.update(area="9"), "the area '9', which evaluation needs: expected the obj"),
        (lambda a: a.update(id="a"), "the id 'a', which evaluation needs: expected a number"),
        (lambda a: a.update(iscrowd=None), "the iscrowd None, which evaluation needs: expected 0"),
        (lambda a: a.pop("bbox"), "the bbox None, expected 4 numbers"),
    ],
)
def test_what_an_evaluation_needs_is_missed_before(own_data, tmp_path, change, reason, eval_only):
    run_tiny(tmp_path / "weights", "train.max_iter=1", "dataloader.evaluator=null")
    edit(own_data, lambda c: change(c["annotations"][1]))
    weights = f"train.init_checkpoint={tmp_path}/weights/model_final.pth"
    overrides = ["dataloader.test.dataset.names=spoilt", weights]
    message = fails(tmp_path, *overrides, eval_only=eval_only)
    name = "a" if "'a'" in reason else 2
    assert message.startswith(f"{own_data}/instances.json: annotation {name} has {reason}")


def test_annotations_without_iscrowd_are_of_single_objects(own_data, tmp_path):
    edit(own_data, lambda c: c["annotations"][1].pop("iscrowd"))
    results = run_tiny(tmp_path, "dataloader.test.dataset.names=spoilt", "train.max_iter=1")
    assert "bbox" in results


def test_an_annotation_file_is_a_dict(own_data, tmp_path):
    (own_data / "instances.json").write_text("[1]")
    assert fails(tmp_path, *use("spoilt")) == (
        f"{own_data}/instances.json is not a COCO annotation file: it holds a list, "
        "expected a dict of images, annotations and categories"
    )


def test_a_missing_image_is_not_found(own_data, tmp_path, engine_log):
    (own_data / "000.png").unlink()
    message = fails(tmp_path, "dataloader.test.dataset.names=spoilt")
    assert message == f"image {own_data}/000.png not found"
    run_tiny(tmp_path / "out", "dataloader.train.dataset.names=spoilt", "train.max_iter=6")
    assert f"image {own_data}/000.png not found: skipped" in engine_log.text


def test_bad_boxes_are_dropped_in_training(own_data, tmp_path, engine_log):
    def spoil(content):
        content["annotations"][0]["bbox"][2] = 0
        content["annotations"][1]["bbox"][0] = 500

    edit(own_data, spoil)
    run_tiny(tmp_path / "out", *use("spoilt"), "train.max_iter=6")
    assert "dropped 1 boxes of non-positive size and 1 outside their image" in engine_log.text
    assert len(metrics(tmp_path / "out")) == 7


def test_undecodable_image_is_skipped_in_training(own_data, tmp_path, engine_log):
    broken = own_data / "003.png"
    broken.write_bytes(broken.read_bytes()[:50])
    run_tiny(tmp_path / "out", "dataloader.train.dataset.names=spoilt", "train.max_iter=8")
    assert engine_log.text.count(f"cannot decode image {broken}") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_image_stops_an_evaluation(own_data, tmp_path, workers, capfd):
    run_tiny(tmp_path / "out", "train.max_iter=1")
    (own_data / "003.png").write_bytes(b"nothing")
    capfd.readouterr()
    code = exit_code_of(
        lambda: run_tiny(
            tmp_path / "e",
            *use("spoilt"),
            f"dataloader.test.num_workers={workers}",
            f"train.init_checkpoint={tmp_path}/out/model_final.pth",
            eval_only=True,
        )
    )
    assert code == 2
    assert capfd.readouterr().err.endswith(f"error: cannot decode image {own_data}/003.png\n")


def test_more_classes_than_the_model(tmp_path):
    message = fails(tmp_path, "model.num_classes=2")
    assert message == (
        "data set 'tiny_train' has 3 classes, the model 2: set the model's num_classes"
    )


@pytest.mark.parametrize("eval_only", [False, True])
def test_fewer_classes_than_the_model(own_data, tmp_path, eval_only):
    def leave_two(content):
        content["categories"].pop()
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] < 3]

    run_tiny(tmp_path / "start", "train.max_iter=1", "train.eval_period=0")
    edit(own_data, leave_two)
    weights = f"train.init_checkpoint={tmp_path}/start/model_final.pth"
    message = fails(tmp_path, *use("spoilt"), weights, eval_only=eval_only)
    assert message == "data set 'spoilt' has 2 classes, the model 3: set the model's num_classes"
    assert not (tmp_path / "out" / "metrics.json").exists()
    run_tiny(tmp_path / "out", *use("spoilt"), "~dataloader.evaluator", "train.max_iter=1")


def test_settings_out_of_range(tmp_path):
    assert fails(tmp_path, "train.max_iter=0") == "train.max_iter is 0, expected at least 1"
    message = fails(tmp_path, "train.checkpointer.max_to_keep=0")
    assert message == "train.checkpointer.max_to_keep is 0, expected at least 1"
    assert "total_batch_size is 0" in fails(tmp_path, "dataloader.train.total_batch_size=0")
    message = fails(tmp_path, "train.amp.enabled=True", "train.amp.dtype=float16")
    assert "float16 needs CUDA" in message
    for value in ("inf", "nan"):
        message = fails(tmp_path, f"train.max_iter={value}")
        assert message == f"train.max_iter={value} is of type float, expected int"
    message = fails(tmp_path, "train.output_dir=null")
    assert message == "train.output_dir is None, expected a folder"
    (tmp_path / "file").write_text("")
    assert "cannot create train.output_dir" in fails(tmp_path, f"train.output_dir={tmp_path}/file")
    assert "only TensorBoard" in fails(tmp_path, "+train.wandb.enabled=True")


def test_an_error_of_one_process_is_printed_by_it(monkeypatch, capfd):
    def meet(error):
        raise error

    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code_of(lambda: meet(UserError("of all"))) == 2
    assert exit_code_of(lambda: meet(LocalError("of one"))) == 2
    assert capfd.readouterr().err == "error: of one\n"
    assert waits == [PATIENCE]  # for the one that prints, as a launcher ends all with the first


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"train\.device is 'cuda', but this machine has no CUDA"):
        resolve_device("cuda")
    with pytest.raises(UserError, match="expected auto, cpu or cuda"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"


def test_weights_of_another_architecture(tmp_path):
    torch.save({"a.b": torch.zeros(2)}, tmp_path / "other.pth")
    message = fails(tmp_path, f"train.init_checkpoint={tmp_path}/other.pth")
    assert "is of another architecture than the model: " in message
    assert "1 unknown to the model (a.b)" in message


def test_torchrun_is_recognised():
    assert started_by_torchrun({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert not started_by_torchrun({"RANK": "0"})


@pytest.mark.parametrize(("rank", "backend"), [("1", "cpu:gloo,cuda:nccl"), ("2", "gloo")])
def test_gloo_is_there_beside_cuda(monkeypatch, rank, backend):
    for name, value in {"RANK": rank, "WORLD_SIZE": "3", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", chosen.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    assert run_in_processes(lambda args: 7, Namespace(opts=[])) == 7
    assert chosen == ([1, backend] if rank == "1" else [backend])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    run_in_processes(lambda args: 0, Namespace(opts=["train.device=cpu"]))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
