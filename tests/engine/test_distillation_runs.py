"""Runs of a student under a teacher: what their checkpoints hold, resuming, evaluation, errors."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from tiny_run import continue_from, metrics, run_tiny

from engine.errors import UserError

CONFIG = Path(__file__).with_name("distill_config.py")


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(5)
    detector = instantiate(LazyConfig.load(str(CONFIG)).model.teacher.detector)
    torch.save({"model": detector.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def settings(teacher_weights):
    return (
        f"teacher.init_checkpoint={teacher_weights}",
        "train.model_ema.enabled=True",
        "train.checkpointer.max_to_keep=9",
        "train.max_iter=6",
        "train.eval_period=4",
    )


@pytest.fixture(scope="module")
def whole_run(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_tiny(folder, *settings, config=CONFIG)
    return folder


def test_a_checkpoint_is_the_students(whole_run):
    stored = torch.load(whole_run / "model_final.pth", weights_only=True)
    student = instantiate(LazyConfig.load(str(CONFIG)).model.student)
    student.load_state_dict(stored["model"], strict=True)
    assert stored["ema_state"].keys() >= dict(student.named_parameters()).keys()
    apart = stored["training_parts"].keys()
    assert {key.split(".")[0] for key in apart} == {"objectives", "queries"}
    assert any("adapters" in key for key in apart)


def test_resuming_is_exact_adapters_and_averages_included(whole_run, settings, tmp_path):
    continue_from(whole_run, tmp_path / "run", 2)
    run_tiny(tmp_path / "run", *settings, config=CONFIG, resume=True)
    kept = [_without_clock(metrics(folder)) for folder in (whole_run, tmp_path / "run")]
    assert kept[0] == kept[1]
    ends = [
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (whole_run, tmp_path / "run")
    ]
    for part in ("model", "ema_state", "training_parts"):
        for key, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][key]), (part, key)


def _without_clock(records):
    return {
        iteration: {k: v for k, v in record.items() if k != "teacher_share"}
        for iteration, record in records.items()
    }


def test_every_objective_and_the_measures_are_logged(whole_run):
    last = metrics(whole_run)[5]
    for name in (
        "loss_logits_positive_class",
        "loss_target_aware",
        "loss_group_giou",
        "student_quality",
        "teacher_quality",
        "teacher_share",
        "student_instability_0",
        "teacher_instability_1",
    ):
        assert name in last


def test_evaluation_needs_no_teacher(whole_run, tmp_path):
    checkpoint = f"train.init_checkpoint={whole_run}/model_final.pth"
    results = run_tiny(tmp_path, checkpoint, config=CONFIG, eval_only=True)
    assert "AP" in results["bbox"]


def test_a_run_without_teacher_weights_does_not_start(tmp_path):
    with pytest.raises(UserError, match=r"set teacher\.init_checkpoint=FILE"):
        run_tiny(tmp_path / "run", config=CONFIG)
    with pytest.raises(UserError, match=r"unknown key 'teacher\.init_chekpoint'.*did you mean"):
        run_tiny(tmp_path / "run", "teacher.init_chekpoint=x", config=CONFIG)
