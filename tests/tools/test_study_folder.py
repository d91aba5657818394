"""The folder of a run, and when its settings count as changed."""

import dataclasses
import json
import os

import pytest
import tiny_study
import torch

from engine.config import load_config
from engine.errors import UserError
from tools.study_folder import Configs, RunFolder

PRESET = tiny_study.PRESETS["cpu"]
STUDENT, TEACHER, SLOW = PRESET.cells


def digests(preset, device="cpu"):
    configs = Configs(preset, device)
    return {cell.name: configs.digest(cell) for cell in preset.cells}


def test_a_written_config_is_the_whole_config(tmp_path):
    folder, configs = RunFolder(tmp_path, "student", 3), Configs(PRESET, "cpu")
    assert not folder.begin(
        configs.of(STUDENT), "digest", 3, {"teacher.init_checkpoint": tmp_path / "teacher.pth"}
    )
    config, expected = load_config(str(folder.config)), STUDENT.build()
    assert (config.train.seed, config.train.device) == (3, "cpu")
    assert config.train.output_dir == str(tmp_path / "student" / "seed3")
    assert config.model.teacher.init_checkpoint == str(tmp_path / "teacher.pth")
    assert len(config.model.objectives) == len(expected.model.objectives) > 1
    assert config.train.max_iter == 3
    assert configs.of(STUDENT).train.output_dir != config.train.output_dir  # no trace is left


def test_a_digest_is_of_the_settings_and_those_of_the_teacher():
    def longer():
        config = TEACHER.build()
        config.train.max_iter += 1
        return config

    before = digests(PRESET)
    changed = dataclasses.replace(TEACHER, build=longer)
    after = digests(dataclasses.replace(PRESET, cells=(STUDENT, changed, SLOW)))
    assert {name for name in before if before[name] != after[name]} == {"student", "teacher"}
    assert before == digests(PRESET)
    assert len(set(before.values())) == 3
    assert not set(before.values()) & set(digests(PRESET, "cuda").values())
    backbone = dataclasses.replace(PRESET, backbone=dataclasses.replace(SLOW, name="body"))
    images = dataclasses.replace(PRESET, shapes={**PRESET.shapes, "seed": 1})
    for other in (backbone, images):
        assert all(before[name] != digest for name, digest in digests(other).items())
    renamed = dataclasses.replace(SLOW, title="other", claim="other")
    assert before == digests(dataclasses.replace(PRESET, cells=(STUDENT, TEACHER, renamed)))


def test_a_student_needs_a_place_for_its_teacher():
    cell = dataclasses.replace(SLOW, teacher="teacher")
    preset = dataclasses.replace(PRESET, cells=(TEACHER, cell))
    with pytest.raises(UserError, match=r"'slow' has the teacher 'teacher', but its config no"):
        Configs(preset, "cpu").of(cell)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, "slow", 0)


def begin(folder, digest="a"):
    return folder.begin(Configs(PRESET, "cpu").of(SLOW), digest, 0, {})


def test_time_is_summed_over_the_parts(folder, monkeypatch):
    for start, end in ((100.0, 104.0), (200.0, 201.5)):
        monkeypatch.setattr("time.time", lambda now=start: now)
        begin(folder)
        monkeypatch.setattr("time.time", lambda now=end: now)
        folder.end()
    assert folder.seconds() == 5.5


def test_a_part_whose_end_nobody_saw_lasted_until_its_last_line(folder, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 100.0)
    begin(folder)
    folder.console.write_text("a line\n")
    os.utime(folder.console, (107.0, 107.0))
    monkeypatch.setattr("time.time", lambda: 200.0)
    begin(folder)
    os.utime(folder.console, (250.0, 250.0))
    monkeypatch.setattr("time.time", lambda: 201.5)
    folder.end()
    assert folder.seconds() == 7.0 + 1.5


def test_weights_and_checkpoints_of_other_settings_are_set_aside(folder):
    assert not begin(folder)
    folder.end()
    folder.weights.write_text("weights")
    assert folder.has_weights("a")
    assert folder.is_begun("a")
    assert not folder.has_weights("b")
    assert not folder.is_begun("b")
    assert not begin(folder)
    assert folder.weights.exists()
    assert begin(folder, "b")
    assert not folder.weights.exists()
    assert folder.path.with_name("seed0.previous-1").joinpath("model_final.pth").exists()
    assert begin(folder, "c")
    assert folder.path.with_name("seed0.previous-2").exists()


def test_a_backbone_is_cut_out_of_the_last_weights(folder):
    begin(folder)
    weights = {"backbone.a": torch.ones(2), "neck.backbone.b": torch.ones(1)}
    torch.save({"model": weights, "optimizer": {}}, folder.weights)
    assert list(torch.load(folder.backbone())["model"]) == ["backbone.a"]
    torch.save({"model": {"backbone.c": torch.ones(2)}}, folder.weights)
    os.utime(folder.backbone(), (0, 0))  # older than the weights
    assert list(torch.load(folder.backbone())["model"]) == ["backbone.c"]
    torch.save({"model": {"neck.a": torch.ones(2)}}, folder.weights)
    os.utime(folder.path / "backbone.pth", (0, 0))
    with pytest.raises(UserError, match=r"holds no weights named backbone"):
        folder.backbone()


def test_progress_is_that_of_the_log(folder):
    assert folder.iterations_done() == 0
    begin(folder)
    lines = [{"iteration": 3, "total_loss": 1}, {"iteration": 7, "total_loss": 1}]
    lines += [{"iteration": 9, "bbox/AP": 1}]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iter')
    assert folder.iterations_done() == 8
    folder.console.write_text("one\n\ntwo\nthree\n")
    assert folder.last_lines(2) == ["two", "three"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"settings": "a"}',
        '{"settings": 5, "parts": []}',
        '{"settings": "a", "parts": 5}',
        '{"settings": "a", "parts": [[]]}',
        '{"settings": "a", "parts": [["x", 2]]}',
    ],
)
def test_a_damaged_state_is_named(folder, text):
    begin(folder)
    (folder.path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state.json is damaged: remove .*seed0"):
        folder.is_begun("a")
