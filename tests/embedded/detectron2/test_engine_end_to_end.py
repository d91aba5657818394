"""Trainer, hooks, writers and checkpoints together: the recorded run, a resume, a whole run."""

import itertools
import json
import math

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer, default_writers, hooks
from detectron2.solver import WarmupParamScheduler
from detectron2.utils.events import JSONWriter
from fvcore.common.param_scheduler import MultiStepParamScheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn


@pytest.fixture(scope="module")
def recorded(reference_dir):
    return json.loads((reference_dir / "detrex" / "runtime.json").read_text())["trainer"]


class Toy(nn.Module):
    """The recorded set-up: loss_x = (w0 d)^2, loss_y = (w1 - d)^2, and a buffer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.register_buffer("b", torch.zeros(1))

    def forward(self, d):
        return {"loss_x": (self.w[0] * d) ** 2, "loss_y": (self.w[1] - d) ** 2}


class CallRecorder(HookBase):
    def __init__(self):
        self.calls = []

    def before_train(self):
        self.calls.append("before_train")

    def before_step(self):
        self.calls.append(f"before_step {self.trainer.iter}")

    def after_backward(self):
        self.calls.append(f"after_backward {self.trainer.iter}")

    def after_step(self):
        self.calls.append(f"after_step {self.trainer.iter}")

    def after_train(self):
        trainer = self.trainer
        self.calls.append(f"after_train iter={trainer.iter} storage.iter={trainer.storage.iter}")


class ToyRun:
    """The recorded hooks around the toy model."""

    def __init__(self, folder):
        model = Toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.model = model
        self.trainer = SimpleTrainer(model, itertools.cycle([0, 1, 2]), optimizer)
        self.checkpointer = DetectionCheckpointer(model, str(folder), trainer=self.trainer)
        self.evaluated_at = []
        self.recorder = CallRecorder()
        schedule = MultiStepParamScheduler([1, 0.1], milestones=[5], num_updates=10)
        self.trainer.register_hooks(
            [
                hooks.IterationTimer(),
                self.recorder,
                hooks.LRScheduler(scheduler=WarmupParamScheduler(schedule, 0.5, 0.2)),
                hooks.PeriodicCheckpointer(self.checkpointer, 3, max_to_keep=2),
                hooks.EvalHook(4, self.evaluate),
                hooks.PeriodicWriter([JSONWriter(str(folder / "metrics.json"))], period=5),
                None,
            ]
        )

    def evaluate(self):
        self.evaluated_at.append(self.trainer.iter)
        return {"bbox": {"AP": 10.0 + self.trainer.iter, "AP50": float("nan")}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    run = ToyRun(folder)
    run.trainer.train(0, 10)
    return run, folder


def test_calls_match_the_recording(finished, recorded):
    calls, expected = finished[0].recorder.calls, recorded["calls"]
    gap = expected.index("...")
    assert calls[:gap] == expected[:gap]
    assert calls[gap + 1 - len(expected) :] == expected[gap + 1 :]
    assert len(calls) == 2 + 3 * 10


def test_evaluations_and_weights_match_the_recording(finished, recorded):
    run, _ = finished
    assert run.evaluated_at == recorded["eval_ran_at_trainer_iter"]
    assert run.model.w.tolist() == pytest.approx(recorded["final_w"], rel=1e-6)


def test_files_and_metrics_match_the_recording(finished, recorded):
    _, folder = finished
    assert sorted(file.name for file in folder.iterdir()) == recorded["files_at_end"]
    assert (folder / "last_checkpoint").read_text() == recorded["last_checkpoint"]
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    expected = recorded["metrics_json"]
    assert [sorted(line) for line in lines] == [sorted(line) for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        for name, value in wanted.items():
            if value == "<time>":
                assert line[name] >= 0
            elif value == "nan":
                assert math.isnan(line[name])
            else:
                assert line[name] == pytest.approx(value, rel=1e-6)


def test_checkpoints_match_the_recording(finished, recorded):
    _, folder = finished
    state = torch.load(folder / "model_final.pth", weights_only=True)
    assert sorted(state) == recorded["checkpoint_keys"]
    assert sorted(state["trainer"]) == recorded["checkpoint_trainer_keys"]
    assert state["trainer"]["hooks"] == recorded["checkpoint_trainer_hooks"]
    iterations = [state["iteration"], state["trainer"]["iteration"]]
    assert iterations == recorded["checkpoint_iteration"]
    assert sorted(state["model"]) == recorded["model_keys"]


def test_resume_matches_the_recording(tmp_path, recorded):
    ToyRun(tmp_path).trainer.train(0, 4)
    run = ToyRun(tmp_path)
    run.checkpointer.resume_or_load("", resume=True)
    expected = recorded["resume"]["after train(0, 4) then resume_or_load(resume=True)"]
    assert run.trainer.iter == expected["trainer.iter"]
    assert run.checkpointer.has_checkpoint() == expected["has_checkpoint"]
    run.trainer.train(expected["continue_from"], 10)
    assert run.model.w.tolist() == pytest.approx(recorded["resume"]["final_w"], rel=1e-6)


def test_no_resume_starts_afresh(tmp_path):
    ToyRun(tmp_path).trainer.train(0, 4)
    run = ToyRun(tmp_path)
    run.checkpointer.resume_or_load("", resume=False)
    assert run.trainer.iter == 0
    assert run.model.w.tolist() == [2.0, -1.0]


class Regression:
    """A linear model that learns y = 2 x0 - x1; batches are a function of the iteration."""

    def __init__(self, folder, max_iter, start=0):
        torch.manual_seed(0)
        self.model = self.WithLoss()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.trainer = SimpleTrainer(self.model, self.batches(start), optimizer)
        self.checkpointer = DetectionCheckpointer(self.model, str(folder), trainer=self.trainer)
        self.max_iter = max_iter
        schedule = MultiStepParamScheduler([1, 0.1], milestones=[15], num_updates=20)
        self.trainer.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(scheduler=schedule),
                hooks.PeriodicCheckpointer(self.checkpointer, 5),
                hooks.EvalHook(6, self.evaluate),
                hooks.BestCheckpointer(6, self.checkpointer, "fit/error", mode="min"),
                hooks.PeriodicWriter(default_writers(str(folder), 20), period=4),
            ]
        )

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, batch):
            x, y = batch
            error = self.linear(x) - y
            return {"loss_square": error.square().mean(), "loss_abs": 0.1 * error.abs().mean()}

    @staticmethod
    def batches(start):
        for iteration in itertools.count(start):
            x = torch.randn(16, 2, generator=torch.Generator().manual_seed(iteration))
            yield x, 2 * x[:, :1] - x[:, 1:]

    def evaluate(self):
        weight = self.model.linear.weight.detach()
        return {"fit": {"error": (weight - torch.tensor([[2.0, -1.0]])).norm().item()}}

    def train(self, start=0, max_iter=None):
        self.trainer.train(start, max_iter or self.max_iter)
        return self


def _scalars(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line[name] for line in lines if name in line}


def test_a_whole_run_learns_and_leaves_its_files(tmp_path):
    run = Regression(tmp_path, 20).train()

    losses = _scalars(tmp_path, "total_loss")
    assert list(losses) == [3, 7, 11, 15, 19]
    assert losses[19] < 0.5 * losses[3]
    errors = _scalars(tmp_path, "fit/error")
    assert list(errors) == [5, 11, 17, 20]
    assert errors[20] == pytest.approx(run.evaluate()["fit"]["error"])

    names = {file.name for file in tmp_path.iterdir() if not file.name.startswith("events")}
    periodic = {f"model_{i:07d}.pth" for i in (4, 9, 14, 19)}
    assert names == periodic | {
        "model_final.pth",
        "model_best.pth",
        "last_checkpoint",
        "metrics.json",
    }
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best["iteration"] == min(errors, key=errors.get)

    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"total_loss", "loss_square", "lr", "time", "fit/error"} <= set(events.Tags()["scalars"])
    # TensorBoard stores float32; iterations of evaluations are those of metrics.json.
    in_events = {event.step: event.value for event in events.Scalars("fit/error")}
    assert in_events == pytest.approx(errors, rel=1e-6)
    assert [event.value for event in events.Scalars("lr")][-1] == pytest.approx(0.01)


@pytest.mark.parametrize(("stop", "last_saved"), [(11, 9), (13, 11)])
def test_resumed_run_equals_an_uninterrupted_one_given_the_same_batches(tmp_path, stop, last_saved):
    """The plain detectron2 flow restores all but the data order, which is arranged here.

    The newest checkpoint is a periodic one (iteration 9) or that of the best model (11).
    """
    whole = Regression(tmp_path / "whole", 20).train()

    def interrupt(trainer):
        if trainer.iter == stop:
            raise KeyboardInterrupt

    folder = tmp_path / "parts"
    first = Regression(folder, 20)
    first.trainer.register_hooks([hooks.CallbackHook(before_step=interrupt)])
    with pytest.raises(KeyboardInterrupt):
        first.train()

    second = Regression(folder, 20, start=last_saved + 1)
    second.checkpointer.resume_or_load("", resume=True)
    assert second.trainer.iter == last_saved
    second.train(second.trainer.iter + 1)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)
    lr = {i: rate for rate, i in second.trainer.storage.history("lr").values()}
    assert lr == pytest.approx({i: 0.1 if i < 15 else 0.01 for i in range(last_saved + 1, 20)})


def test_resuming_a_finished_run_trains_no_more(tmp_path):
    finished = Regression(tmp_path, 20).train()
    again = Regression(tmp_path, 20, start=20)
    again.checkpointer.resume_or_load("", resume=True)
    # The best model may have been saved after training, when trainer.iter was already 20.
    again.train(min(again.trainer.iter + 1, 20))
    for name, value in finished.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert again.trainer.start_iter == 20
