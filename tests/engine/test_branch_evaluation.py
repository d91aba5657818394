"""Evaluating KS-DETR's teachers on ground-truth masks, beside the student and in its place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, inference_on_dataset
from detectron2.structures import Instances
from tiny_run import metrics, run_tiny

from engine.branches import BranchEvaluator, named_branches
from engine.config import load_config
from engine.errors import LocalError, UserError, exit_code_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("tiny_ks_config.py")
BRANCHES = ("student", "share_v", "share_a")
ALL = "evaluation.branch=[student,share_v,share_a]"


def run(output, *overrides, **options):
    return run_tiny(output, *overrides, config=CONFIG, **options)


def detections(output, branch=""):
    """What an evaluation has written, by image."""
    path = Path(output, "inference", branch, "coco_instances_results.json")
    found = {}
    for item in json.loads(path.read_text()):
        found.setdefault(item["image_id"], []).append([*item["bbox"], item["score"]])
    return {image: np.array(rows) for image, rows in found.items()}


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A run of two iterations that evaluates all branches after each, averages included."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder, ALL, "train.model_ema.enabled=True")


def weights(trained):
    return f"train.init_checkpoint={trained[0]}/model_final.pth"


def test_training_logs_every_branch(trained):
    folder, results = trained
    for record in (metrics(folder)[0], metrics(folder)[2]):
        for average in ("", "ema/"):
            for branch in BRANCHES:
                assert f"{average}{branch}/bbox/AP50" in record
            assert record[f"{average}student/bbox/AP"] == record[f"{average}bbox/AP"]
    assert len({repr(results[branch]) for branch in BRANCHES}) == 3
    assert (folder / "model_best.pth").is_file()


def test_evaluating_one_or_several_branches_gives_the_same(trained, tmp_path):
    expected = trained[1]
    every = run(tmp_path / "every", ALL, weights(trained), eval_only=True)
    for branch in BRANCHES:
        assert repr(every[branch]) == repr(expected[branch]), branch
    assert repr(every["bbox"]) == repr(expected["bbox"])
    one = run(tmp_path / "one", "evaluation.branch=share_v", weights(trained), eval_only=True)
    assert list(one) == ["share_v"]
    assert repr(one["share_v"]) == repr(every["share_v"])


def test_averaged_weights(trained, tmp_path):
    averaged = run(
        tmp_path,
        "evaluation.branch=share_a",
        weights(trained),
        "train.model_ema.enabled=True",
        "train.model_ema.use_ema_weights_for_eval_only=True",
        eval_only=True,
    )
    assert list(averaged) == ["share_a"]
    assert repr(averaged["share_a"]) == repr(trained[1]["ema"]["share_a"])


@pytest.mark.parametrize("setting", ["student", "[student]"])
def test_the_student_alone_keeps_its_names_and_needs_no_ground_truth(trained, tmp_path, setting):
    plain = run(tmp_path, f"evaluation.branch={setting}", weights(trained), eval_only=True)
    assert list(plain) == ["bbox"]
    run(tmp_path / "all", ALL, weights(trained), eval_only=True)
    alone, beside = detections(tmp_path), detections(tmp_path / "all")
    assert alone.keys() == beside.keys()
    for image, rows in alone.items():
        np.testing.assert_allclose(beside[image], rows, rtol=1e-4, atol=1e-3)


def test_detections_are_those_of_the_branches_in_training(trained, tmp_path):
    """All branches are decoded as one batch where the losses see them."""
    run(tmp_path, ALL, weights(trained), "dataloader.test.batch_size=1", eval_only=True)
    written = [detections(tmp_path, branch) for branch in ("", "share_v", "share_a")]
    config = load_config(str(CONFIG))
    model = instantiate(config.model).eval()
    model.load_state_dict(torch.load(trained[0] / "model_final.pth", weights_only=True)["model"])
    config.dataloader.test.mapper.is_train = True
    mapper = instantiate(config.dataloader.test.mapper)
    for record in DatasetCatalog.get("tiny_train"):
        item = mapper(record)
        x, y, w, h = record["annotations"][0]["bbox"]
        box = torch.tensor([[x, y, x + w, y + h]]) * 2.0  # the shorter side grows from 24 to 48
        torch.testing.assert_close(item["instances"].gt_boxes.tensor, box)
        with torch.no_grad():
            images = model.preprocess([item])
            memory = model.encode(model.extract(images), model.prepare_targets([item]))
            predictions = model.predict(model.decode(memory, model.queries(memory)))
        for index, found in enumerate(written):
            of_branch = predictions.of_branch(index)
            (result,) = model.inference(of_branch, images.image_sizes, [item])
            scores = result["instances"].scores
            rows = found[record["image_id"]]
            np.testing.assert_allclose(rows[:, 4], scores, rtol=1e-5, atol=1e-6)
            low, high = result["instances"].pred_boxes.tensor.split(2, dim=1)
            np.testing.assert_allclose(rows[:, :2], low, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(rows[:, 2:4], high - low, rtol=1e-4, atol=1e-3)


class Recorder(DatasetEvaluator):
    """Keeps what it is given."""

    def reset(self):
        self.inputs, self.outputs = [], []

    def process(self, inputs, outputs):
        self.inputs += inputs
        self.outputs += outputs

    def evaluate(self):
        return {"count": float(len(self.outputs))}


def test_several_evaluators_a_branch(trained, tmp_path):
    path, saved = tmp_path / "config.yaml", LazyConfig.load(str(trained[0] / "config.yaml"))
    saved.dataloader.evaluator = [
        {"_target_": "detectron2.evaluation.COCOEvaluator", "dataset_name": "tiny_train"},
        {"_target_": "test_branch_evaluation.Recorder"},
    ]
    LazyConfig.save(saved, str(path))
    results = run_tiny(tmp_path, weights(trained), ALL, eval_only=True, config=path)
    assert set(results) == {"bbox", "count", *BRANCHES}
    assert results["share_a"]["count"] == 12.0
    assert results["share_v"]["bbox"] == pytest.approx(trained[1]["share_v"]["bbox"], nan_ok=True)


def test_every_evaluator_gets_its_own_branch():
    evaluators = {"a": Recorder(), "b": Recorder()}
    outputs = {"b": ["of b"], "a": ["of a"], "c": ["of c"]}
    results = inference_on_dataset(lambda batch: outputs, [["image"]], BranchEvaluator(evaluators))
    assert results == {"a": {"count": 1.0}, "b": {"count": 1.0}}
    assert (evaluators["a"].outputs, evaluators["b"].outputs) == (["of a"], ["of b"])


def test_two_processes(trained, tiny_data, tmp_path):
    command = [sys.executable, ROOT / "tools/train_net.py", "--config-file", CONFIG]
    options = ["--num-gpus", "2", "--dist-url", "auto", "--eval-only", ALL, weights(trained)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(CONFIG.parent),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*command, *options, f"train.output_dir={tmp_path}", "dataloader.test.batch_size=1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", ALL, weights(trained), "dataloader.test.batch_size=1", eval_only=True)
    for branch in ("", *BRANCHES[1:]):
        one, two = detections(tmp_path / "one", branch), detections(tmp_path, branch)
        assert one.keys() == two.keys()
        for image, rows in one.items():
            np.testing.assert_allclose(two[image], rows, rtol=1e-4, atol=1e-3)


# --- a plain detector's weights -------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    """The trained checkpoint without teachers, averages included."""
    content = torch.load(trained[0] / "model_final.pth", weights_only=True)
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    kept = {
        part: {key: value for key, value in content[part].items() if ".teacher." not in key}
        for part in ("model", "ema_state")
    }
    assert len(content["model"]) - len(kept["model"]) == 4
    torch.save(kept, path)
    return path


@pytest.mark.parametrize("averaged", [False, True])
def test_the_student_needs_no_teacher_weights(trained, plain, tmp_path, engine_log, averaged):
    overrides = [f"train.init_checkpoint={plain}", f"train.model_ema.enabled={averaged}"]
    overrides += [f"train.model_ema.use_ema_weights_for_eval_only={averaged}"]
    found = run(tmp_path, *overrides, eval_only=True)
    expected = trained[1]["ema"] if averaged else trained[1]
    assert repr(found["bbox"]) == repr(expected["bbox"])
    assert engine_log.text.count("4 weights only training uses were not loaded but") == 1


@pytest.mark.parametrize("setting", [ALL, "evaluation.branch=share_a"])
def test_a_teacher_needs_its_weights(plain, tmp_path, setting):
    message = fails(tmp_path, setting, f"train.init_checkpoint={plain}", eval_only=True)
    assert "plain.pth has no teacher weights (4 missing: transformer.encoder.layers.1." in message
    assert message.endswith("which evaluation.branch needs for all but the student")


def test_averages_of_another_model_are_refused(plain, tmp_path):
    content = torch.load(plain, weights_only=True)
    del content["ema_state"]["class_embed.bias"]
    torch.save(content, tmp_path / "damaged.pth")
    overrides = [f"train.init_checkpoint={tmp_path}/damaged.pth", "train.model_ema.enabled=True"]
    overrides += ["train.model_ema.use_ema_weights_for_eval_only=True"]
    message = fails(tmp_path, *overrides, eval_only=True)
    assert "lacks averages (ema_state) of 1 of the model's weights, such as class_e" in message


# --- what is wrong is said in one line ------------------------------------------------------------


def fails(tmp_path, *overrides, config=CONFIG, **options):
    with pytest.raises(UserError) as caught:
        run_tiny(tmp_path / "out", *overrides, config=config, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("eval_only", [True, False])
def test_unknown_branch(tmp_path, eval_only):
    setting, unread = "evaluation.branch=[student,share_b]", tmp_path / "unread.pth"
    unread.touch()
    message = fails(tmp_path, setting, f"train.init_checkpoint={unread}", eval_only=eval_only)
    assert message.startswith(
        "evaluation.branch is 'share_b', the ConditionalDETR of this config has "
        "student, share_v, share_a (did you mean 'share_"
    )


def test_a_dual_attention_has_one_teacher(tmp_path):
    dual = "model.transformer.encoder.branches=[share_a]"
    message = fails(tmp_path, "evaluation.branch=share_v", dual)
    assert "has student, share_a (did you mean" in message


def test_a_model_without_branches(tmp_path):
    config = CONFIG.with_name("tiny_config.py")
    message = fails(tmp_path, "evaluation.branch=share_v", config=config)
    assert message == (
        "evaluation.branch is 'share_v', the TinyDetector of this config has student"
    )
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_plain_detector_has_the_student_alone(tmp_path):
    path = tmp_path / "plain.yaml"
    config = load_config(str(CONFIG))
    config.model.transformer.encoder = config.model.transformer.encoder.encoder
    LazyConfig.save(config, str(path))
    message = fails(tmp_path, "evaluation.branch=share_v", config=path)
    assert message.endswith("the ConditionalDETR of this config has student")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.branch=[]", "evaluation.branch is [], expected a branch's name or a list"),
        ("evaluation.branch=null", "evaluation.branch is None, expected a branch's name or"),
        ("evaluation.branch=[1]", "evaluation.branch is [1], expected a branch's name or a list"),
        ("evaluation.branch={a:1}", "evaluation.branch={'a': 1} is of type dict, expected str"),
        ("evaluation.brnch=share_v", "unknown key 'evaluation.brnch' (did you mean 'evaluation.br"),
        ("evalution.branch=share_v", "unknown key 'evalution.branch' (did you mean 'evaluation.br"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, override, message):
    assert fails(tmp_path, override, eval_only=True).startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_config_may_set_it_and_names_count_once(tmp_path):
    config = load_config(str(CONFIG), ["evaluation.branch=[share_v,student,share_v]"])
    assert named_branches(config) == ("share_v", "student")
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    assert named_branches(load_config(str(tmp_path / "config.yaml"))) == ("share_v", "student")


def test_a_mapper_without_ground_truth(trained, tmp_path, capsys):
    mapper = "dataloader.test.mapper._target_=test_branch_evaluation.without_annotations"
    remove = [f"~dataloader.test.mapper.{key}" for key in ("augmentation", "is_train")]
    overrides = [mapper, *remove, "~dataloader.test.mapper.augmentation_with_crop"]

    def work():
        run(tmp_path, ALL, weights(trained), *overrides, eval_only=True)

    assert exit_code_of(work) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: evaluation.branch needs ground truth, but the images of")
    assert message.count("\n") == 1
    with pytest.raises(LocalError):
        work()


def without_annotations():
    return lambda record: {"image": torch.zeros(3, 32, 32), "image_id": record["image_id"]}


def test_a_data_set_without_ground_truth(tiny_data, tmp_path):
    content = json.loads((tiny_data / "instances.json").read_text())
    path = tmp_path / "images.json"
    path.write_text(json.dumps({**content, "annotations": []}))
    register_coco_instances("bare", {}, str(path), str(tiny_data))
    message = fails(tmp_path, "dataloader.test.dataset.names=bare", ALL, eval_only=True)
    assert message.startswith("data set 'bare' has no annotations, which evaluation.branch needs")
    DatasetCatalog.remove("bare")
    MetadataCatalog.remove("bare")


# --- which boxes the teachers see -----------------------------------------------------------------


def test_crowds_and_boxes_without_area_are_left_out(trained, tiny_data, tmp_path, monkeypatch):
    content = json.loads((tiny_data / "instances.json").read_text())
    first = content["annotations"][0]
    content["annotations"] += [
        {**first, "id": 101, "iscrowd": 1, "bbox": [0, 0, 20, 20]},
        {**first, "id": 102, "bbox": [3, 3, 0, 5]},
    ]
    path = tmp_path / "crowd.json"
    path.write_text(json.dumps(content))
    register_coco_instances("crowd", {}, str(path), str(tiny_data))
    seen = []

    class Watched(COCOEvaluator):
        def process(self, inputs, outputs):
            seen.extend(inputs)
            super().process(inputs, outputs)

    monkeypatch.setattr("detectron2.evaluation.coco_evaluation.COCOEvaluator", Watched)
    monkeypatch.setattr("detectron2.evaluation.COCOEvaluator", Watched)
    names = "dataloader.test.dataset.names=crowd"
    evaluator = "dataloader.evaluator._target_=detectron2.evaluation.COCOEvaluator"
    setting = "evaluation.branch=share_v"
    results = run(tmp_path, names, evaluator, setting, weights(trained), eval_only=True)
    assert len(seen) == 12
    for item in seen:
        assert isinstance(item["instances"], Instances)
        assert len(item["instances"]) == 1
        assert item["instances"].image_size == item["image"].shape[1:]
    expected = trained[1]["share_v"]["bbox"]  # the mask is the same, the crowd ignored
    assert results["share_v"]["bbox"]["AP-right"] == pytest.approx(expected["AP-right"])
    DatasetCatalog.remove("crowd")
    MetadataCatalog.remove("crowd")
