"""The standard hooks one by one; test_engine_end_to_end.py runs them together."""

import itertools
import logging
import math
import re

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer, TrainerBase, hooks
from detectron2.utils.events import EventWriter
from fvcore.common.param_scheduler import ExponentialParamScheduler
from recorded_cases import embedded_only
from torch import nn


class Idle(TrainerBase):
    """Runs nothing, so that only the hooks matter; fails at the iteration given."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.fail_at = fail_at

    def run_step(self):
        if self.iter == self.fail_at:
            raise RuntimeError("stop here")


def run(hook_list, max_iter, *, start=0, fail_at=None):
    trainer = Idle(fail_at)
    trainer.register_hooks(hook_list)
    if fail_at is None:
        trainer.train(start, max_iter)
    else:
        with pytest.raises(RuntimeError, match="stop here"):
            trainer.train(start, max_iter)
    return trainer


class FakeCheckpointer:
    def __init__(self):
        self.saved = []

    def save(self, name, **extra):
        self.saved.append((name, extra))


def test_callback_hook_calls_with_the_trainer():
    seen = []

    def note(point):
        return lambda trainer: seen.append((point, trainer.iter))

    run([hooks.CallbackHook(before_train=note("bt"), after_step=note("as"))], 2)
    run([hooks.CallbackHook(after_train=note("at"), before_step=note("bs"))], 1)
    assert seen == [("bt", 0), ("as", 0), ("as", 1), ("bs", 0), ("at", 1)]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_iteration_timer_counts_steps_apart_from_hooks(monkeypatch, caplog):
    """Steps take 2 s, other hooks 3 s before and 5 s after; the first two steps are warm-up."""
    clock = Clock()
    for timer in ("time.perf_counter", "fvcore.common.timer.perf_counter"):
        monkeypatch.setattr(timer, clock)

    class Slow(Idle):
        def run_step(self):
            clock.now += 2

    def wait(seconds):
        return lambda trainer: setattr(clock, "now", clock.now + seconds)

    trainer = Slow()
    timer = hooks.IterationTimer(warmup_iter=3)
    trainer.register_hooks(
        [timer, hooks.CallbackHook(before_train=wait(50), after_step=wait(5), after_train=wait(9))]
    )
    with caplog.at_level(logging.INFO, "detectron2.engine.hooks"):
        trainer.train(10, 16)
    assert trainer.storage.history("time").values() == [(2.0, i) for i in (12, 13, 14, 15)]
    logged = [re.findall(r"\d[\d:.]*\b", record.getMessage()) for record in caplog.records]
    assert ["4", "0:00:08", "2.0000"] in logged  # iterations, all their time and that of each
    # From the end of step 1's timing: 5 s hooks of warm-up step 2, then 4 steps of 2 + 5 s.
    assert ["0:00:33", "0:00:25"] in logged  # in all, of which hooks took


def test_iteration_timer_without_a_step_past_warmup(caplog):
    with caplog.at_level(logging.INFO, "detectron2.engine.hooks"):
        trainer = run([hooks.IterationTimer(warmup_iter=3)], 2)
    assert "time" not in trainer.storage.latest()
    assert " iterations " not in caplog.text


class ListWriter(EventWriter):
    def __init__(self, trainer_iter):
        self.calls, self.trainer_iter = [], trainer_iter

    def write(self):
        self.calls.append(self.trainer_iter())

    def close(self):
        self.calls.append("closed")


@pytest.mark.parametrize(
    ("max_iter", "expected"),
    [(7, [2, 5, 6, 7, "closed"]), (6, [2, 5, 6, "closed"]), (2, [1, 2, "closed"])],
)
def test_periodic_writer(max_iter, expected):
    trainer = Idle()
    writer = ListWriter(lambda: trainer.iter)
    trainer.register_hooks([hooks.PeriodicWriter([writer], period=3)])
    trainer.train(0, max_iter)
    assert writer.calls == expected


def test_periodic_writer_closes_after_a_failure():
    writer = ListWriter(lambda: 0)
    run([hooks.PeriodicWriter([writer], period=100)], 5, fail_at=3)
    assert writer.calls == [0, "closed"]


def test_periodic_writer_rejects_other_objects():
    with pytest.raises(AssertionError):
        hooks.PeriodicWriter([print])


@pytest.mark.parametrize(
    ("period", "after_train", "max_iter", "expected"),
    [
        (4, True, 10, [3, 7, 10]),
        (5, True, 10, [4, 10]),  # the last iteration is evaluated once
        (5, False, 10, [4]),
        (0, True, 10, [10]),
        (0, False, 10, []),
        (20, True, 10, [10]),
    ],
)
def test_when_evaluation_runs(period, after_train, max_iter, expected):
    seen = []
    trainer = Idle()
    trainer.register_hooks([hooks.EvalHook(period, lambda: seen.append(trainer.iter), after_train)])
    trainer.train(0, max_iter)
    assert seen == expected


@pytest.mark.parametrize("fail_at", [2, pytest.param(9, marks=embedded_only)])
def test_no_evaluation_after_a_failure(fail_at):
    """In several processes it would wait for the others forever."""
    seen = []
    run([hooks.EvalHook(0, lambda: seen.append(1))], 10, fail_at=fail_at)
    assert seen == []


def test_evaluation_results_are_flattened_and_not_smoothed():
    results = {"bbox": {"AP": 30, "AP50": float("nan"), "per": {"cat": "1.5"}}, "speed": 2.0}
    trainer = run([hooks.EvalHook(0, lambda: results)], 2)
    latest = trainer.storage.latest()
    assert latest["bbox/AP"] == (30.0, 2)
    assert latest["bbox/per/cat"] == (1.5, 2)
    assert latest["speed"] == (2.0, 2)
    assert math.isnan(latest["bbox/AP50"][0])
    assert not any(trainer.storage.smoothing_hints().values())


@pytest.mark.parametrize("nothing", [None, {}])
def test_evaluation_may_return_nothing(nothing):
    assert run([hooks.EvalHook(0, lambda: nothing)], 1).storage.latest() == {}


@pytest.mark.parametrize(
    ("results", "error"),
    [({"bbox": {"AP": "high"}}, ValueError), ({"a": None}, ValueError), ([1.0], AssertionError)],
)
def test_evaluation_results_must_be_numbers(results, error):
    with pytest.raises(error):
        run([hooks.EvalHook(0, lambda: results)], 1)


def _run_best(values, mode="max", fail_at=None):
    checkpointer = FakeCheckpointer()
    best = hooks.BestCheckpointer(2, checkpointer, "bbox/AP", mode, "best")
    scores = iter(values)
    evaluate = hooks.EvalHook(2, lambda: {"bbox": {"AP": next(scores)}})
    run([evaluate, best], 2 * len(values), fail_at=fail_at)
    return checkpointer.saved, best


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [
        ([1.0, 3.0, 2.0, 3.0, 4.0], "max", [1, 3, 10]),
        ([3.0, 1.0, 2.0, 1.0, 0.5], "min", [1, 3, 10]),
        ([NAN, 1.0, NAN, 2.0], "max", [3, 8]),
        ([-1.0, -2.0], "max", [1]),
        ([0.0, 0.0], "max", [1]),
    ],
)
def test_best_checkpointer_saves_when_better(values, mode, expected):
    saved, best = _run_best(values, mode)
    assert saved == [("best", {"iteration": i}) for i in expected]
    assert best.best_iter == expected[-1]
    finite = [v for v in values if math.isfinite(v)]
    assert best.best_metric == (max(finite) if mode == "max" else min(finite))


def test_best_checkpointer_without_its_metric_warns(caplog):
    checkpointer = FakeCheckpointer()
    run([hooks.BestCheckpointer(2, checkpointer, "no/such")], 4)
    assert checkpointer.saved == []
    assert "no/such" in caplog.text


def test_best_checkpointer_rejects_other_modes():
    with pytest.raises(AssertionError, match="median"):
        hooks.BestCheckpointer(1, FakeCheckpointer(), "x", mode="median")


def _sgd(*groups):
    """One optimizer; each group is (number of parameters, lr)."""
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1)) for _ in range(n)], "lr": lr} for n, lr in groups]
    )


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([(1, 0.1), (3, 0.2), (2, 0.3)], 1),
        ([(2, 0.1), (2, 0.2)], 0),
        ([(1, 0.1), (1, 0.2), (1, 0.2)], 1),
        ([(1, 0.3)], 0),
    ],
)
def test_which_group_gives_the_logged_rate(groups, expected):
    assert hooks.LRScheduler.get_best_param_group_id(_sgd(*groups)) == expected


class Steps(SimpleTrainer):
    """An optimizer that steps without a model that learns."""

    def __init__(self, optimizer, scheduler=None):
        super().__init__(nn.Linear(1, 1), itertools.repeat(None), optimizer)
        self.scheduler = scheduler

    def run_step(self):
        self.optimizer.step()


def test_fvcore_schedule_multiplies_the_base_rates():
    optimizer = _sgd((2, 0.1), (1, 0.5))
    trainer = Steps(optimizer)
    hook = hooks.LRScheduler(scheduler=ExponentialParamScheduler(1.0, 0.25))
    trainer.register_hooks([hook])
    assert hook.state_dict() == {}
    trainer.train(0, 4)
    expected = [0.1 * 0.25 ** (i / 4) for i in range(4)]
    rates = [rate for rate, _ in trainer.storage.history("lr").values()]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * 0.25)
    assert hook.state_dict() == {"base_lrs": [0.1, 0.5], "last_epoch": 4}
    assert trainer.storage.smoothing_hints()["lr"] is False


def test_fvcore_schedule_continues_at_the_start_iteration():
    optimizer = _sgd((2, 0.1))
    optimizer.param_groups[0]["initial_lr"] = 0.1  # as an optimizer state of a checkpoint has
    trainer = Steps(optimizer)
    trainer.register_hooks([hooks.LRScheduler(scheduler=ExponentialParamScheduler(1.0, 0.25))])
    trainer.train(2, 4)
    rates = [rate for rate, _ in trainer.storage.history("lr").values()]
    assert rates == pytest.approx([0.1 * 0.25 ** (i / 4) for i in (2, 3)], rel=1e-12)


def test_torch_schedule_is_taken_from_the_trainer_and_restored():
    def build():
        optimizer = _sgd((2, 1.0))
        trainer = Steps(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1))
        trainer.register_hooks([hooks.LRScheduler()])
        return trainer

    first = build()
    first.train(0, 3)
    rates = [rate for rate, _ in first.storage.history("lr").values()]
    assert rates == pytest.approx([1.0, 1.0, 0.1])
    second = build()
    second.load_state_dict(first.state_dict())
    assert second.scheduler.last_epoch == 3
    second.train(3, 5)
    rates = [rate for rate, _ in second.storage.history("lr").values()]
    assert rates == pytest.approx([0.1, 0.01])


def test_a_hook_does_not_keep_its_trainer_alive():
    hook = HookBase()
    Idle().register_hooks([hook])
    with pytest.raises(ReferenceError):
        hook.trainer.iter  # noqa: B018
