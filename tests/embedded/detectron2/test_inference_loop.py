"""inference_on_dataset and the helpers around results."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from torch import nn


class Recorder(DatasetEvaluator):
    def __init__(self, key="sum"):
        self.key = key
        self.resets = 0

    def reset(self):
        self.resets += 1
        self.seen = []

    def process(self, inputs, outputs):
        self.seen.append((inputs, outputs))

    def evaluate(self):
        return {self.key: sum(outputs for _, outputs in self.seen)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.inner = nn.Dropout()
        self.states = []

    def forward(self, batch):
        output = self.weight * batch
        self.states.append((self.training, self.inner.training, output.requires_grad))
        return output.item()


@pytest.mark.parametrize("training", [True, False])
def test_model_runs_in_eval_mode_without_gradients(training):
    model, recorder = Model().train(training), Recorder()
    assert inference_on_dataset(model, [1, 2, 3], recorder) == {"sum": 6}
    assert model.states == [(False, False, False)] * 3
    assert model.training is training
    assert recorder.resets == 1
    assert [inputs for inputs, _ in recorder.seen] == [1, 2, 3]


def test_mode_is_restored():
    model = Model()
    with inference_context(model):
        assert not model.training
    assert model.training


def test_several_or_no_evaluators():
    evaluators = [Recorder("a"), Recorder("b")]
    assert inference_on_dataset(lambda x: x, [1, 2], evaluators) == {"a": 3, "b": 3}
    assert inference_on_dataset(lambda x: x, [1, 2], None) == {}
    assert inference_on_dataset(lambda x: x, [1, 2], DatasetEvaluator()) == {}
    with pytest.raises(AssertionError):
        inference_on_dataset(lambda x: x, [1], DatasetEvaluators([Recorder(), Recorder()]))


def test_callbacks_are_called_in_order():
    calls = []
    names = ["on_start", "before_inference", "after_inference", "on_end"]
    callbacks = {name: lambda name=name: calls.append(name) for name in names}
    inference_on_dataset(lambda x: calls.append("model"), [1, 2], None, callbacks)
    batch = ["before_inference", "model", "after_inference"]
    assert calls == ["on_start", *batch, *batch, "on_end"]


def test_progress_is_logged(caplog, monkeypatch):
    progress = []
    monkeypatch.setattr(
        "detectron2.evaluation.evaluator.log_every_n_seconds",
        lambda level, message, n: progress.append(message),
    )

    def slow(x):
        time.sleep(0.002)

    with caplog.at_level("INFO"):
        inference_on_dataset(slow, list(range(14)), None)
    text = caplog.text
    assert "nference on 14 batches" in text
    numbers = [re.findall(r"\d[\d:.]*\b", message) for message in progress]
    assert [row[:2] for row in numbers] == [[str(done), "14"] for done in (11, 12, 13, 14)]
    assert "0:00:00" in numbers[0]  # until the end
    assert sum("." in number for number in numbers[0]) == 4  # data, model, ..., all
    totals = [re.findall(r"\d[\d:.]*\b", line) for line in text.splitlines() if "0:00:00" in line]
    assert len(totals) == 2  # with all around the model, and the model alone
    assert all(row[-1] == "1" for row in totals)  # process


@pytest.mark.parametrize("batches", [1, 2, 6])
def test_few_batches(batches):
    result = inference_on_dataset(lambda x: x, [1] * batches, Recorder())
    assert result == {"sum": batches}


def test_flatten_results_dict():
    nested = {"bbox": {"AP": 1.0, "deep": {"x": 2}}, "speed": 3}
    assert flatten_results_dict(nested) == {"bbox/AP": 1.0, "bbox/deep/x": 2, "speed": 3}


@pytest.mark.parametrize(
    ("expected", "passes"),
    [
        ([], True),
        ([["bbox", "AP", 40.0, 0.5]], True),
        ([["bbox", "AP", 41.0, 0.5]], False),
        ([["bbox", "APs", 1.0, 9.0]], False),
        ([["bbox", "AP-x", 1.0, 9.0]], False),
    ],
    ids=["nothing", "close", "far", "NaN", "absent"],
)
def test_verify_results(expected, passes):
    cfg = SimpleNamespace(TEST=SimpleNamespace(EXPECTED_RESULTS=expected))
    results = {"bbox": {"AP": 40.4, "APs": float("nan")}}
    if passes:
        assert verify_results(cfg, results)
    else:
        with pytest.raises(SystemExit):
            verify_results(cfg, results)
