"""TrainerBase, SimpleTrainer and AMPTrainer against by-hand numbers and recorded calls."""

import itertools
import threading

import pytest
import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from recorded_cases import embedded_only
from torch import nn


class Quadratic(nn.Module):
    """loss(d) = (w - d)^2, so that one SGD step is known by hand: w -= 2 lr (w - d)."""

    def __init__(self, start=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, d):
        return {"loss": (self.w - d) ** 2}


class Recorder(HookBase):
    def __init__(self, calls, name=""):
        self.calls, self.name = calls, name

    def _note(self, point):
        self.calls.append((self.name, point, self.trainer.iter, self.trainer.storage.iter))

    def before_train(self):
        self._note("before_train")

    def after_train(self):
        self._note("after_train")

    def before_step(self):
        self._note("before_step")

    def after_backward(self):
        self._note("after_backward")

    def after_step(self):
        self._note("after_step")


def make_trainer(data=(0.0,), *, model=None, cls=SimpleTrainer, lr=0.1, **kwargs):
    model = model or Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return cls(model, itertools.cycle(data), optimizer, **kwargs)


def test_hooks_run_in_order_at_every_point():
    calls = []
    trainer = make_trainer()
    trainer.register_hooks([Recorder(calls, "a"), None, Recorder(calls, "b")])
    trainer.train(3, 5)
    points = [("before_train", 3, 3)]
    for i in (3, 4):
        points += [(p, i, i) for p in ("before_step", "after_backward", "after_step")]
    points += [("after_train", 5, 5)]
    assert calls == [(name, *point) for point in points for name in "ab"]


def test_register_hooks_rejects_other_objects():
    with pytest.raises(AssertionError):
        make_trainer().register_hooks(["not a hook"])


def test_trainer_base_runs_the_given_step():
    class Counter(TrainerBase):
        seen = ()

        def run_step(self):
            self.seen += (self.iter,)

    trainer = Counter()
    trainer.train(0, 3)
    assert trainer.seen == (0, 1, 2)
    assert (trainer.start_iter, trainer.max_iter, trainer.iter) == (0, 3, 3)
    with pytest.raises(NotImplementedError):
        TrainerBase().train(0, 1)


def test_after_train_runs_with_the_iteration_of_a_failure():
    class Failing(Quadratic):
        def forward(self, d):
            if d == 2.0:
                raise RuntimeError("broken batch")
            return super().forward(d)

    calls = []
    trainer = make_trainer((0.0, 1.0, 2.0), model=Failing())
    trainer.register_hooks([Recorder(calls)])
    with pytest.raises(RuntimeError, match="broken batch"):
        trainer.train(0, 10)
    assert calls[-1] == ("", "after_train", 2, 2)


@pytest.mark.parametrize("zero_grad_before_forward", [False, True])
def test_sgd_steps_equal_the_formula(zero_grad_before_forward):
    data = [0.0, 1.0, 2.0]
    trainer = make_trainer(data, zero_grad_before_forward=zero_grad_before_forward)
    trainer.train(0, 7)
    w = 1.0
    for i in range(7):
        w -= 0.1 * 2 * (w - data[i % 3])
    assert trainer.model.w.item() == pytest.approx(w, rel=1e-6)


@pytest.mark.parametrize(("before_forward", "expected"), [(True, [0.0]), (False, [7.0])])
def test_when_gradients_are_cleared(before_forward, expected):
    class Probe(Quadratic):
        seen: tuple = ()

        def forward(self, d):
            self.seen += (0.0 if self.w.grad is None else self.w.grad.item(),)
            return super().forward(d)

    trainer = make_trainer(model=Probe(), zero_grad_before_forward=before_forward)
    trainer.model.w.grad = torch.tensor(7.0)
    trainer.train(0, 1)
    assert list(trainer.model.seen) == expected


def test_gradients_are_there_after_backward_and_weights_are_not_updated_yet():
    class Look(HookBase):
        def after_backward(self):
            self.w, self.grad = self.trainer.model.w.item(), self.trainer.model.w.grad.item()

    hook = Look()
    trainer = make_trainer()
    trainer.register_hooks([hook])
    trainer.train(0, 1)
    assert (hook.w, hook.grad) == (1.0, 2.0)
    assert trainer.model.w.item() == pytest.approx(0.8)


def test_data_iterator_is_created_late_kept_and_reset():
    class Loader:
        def __init__(self, value):
            self.value, self.iterators = value, 0

        def __iter__(self):
            self.iterators += 1
            return itertools.repeat(self.value)

    loader, other = Loader(0.0), Loader(1.0)
    model = Quadratic(1.0)
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    assert loader.iterators == 0
    trainer.train(0, 3)
    assert loader.iterators == 1

    trainer.reset_data_loader(lambda: other)
    with torch.no_grad():
        model.w.fill_(1.0)
    trainer.train(3, 4)
    assert (other.iterators, loader.iterators) == (1, 1)
    assert model.w.item() == 1.0  # loss (w - 1)^2 is at its minimum


def test_model_in_eval_mode_is_rejected():
    trainer = make_trainer()
    trainer.model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.train(0, 1)


def test_a_single_tensor_is_the_total_loss():
    class Scalar(Quadratic):
        def forward(self, d):
            return super().forward(d)["loss"]

    trainer = make_trainer((3.0,), model=Scalar())
    trainer.train(0, 1)
    assert trainer.storage.latest()["total_loss"] == (4.0, 0)
    assert set(trainer.storage.latest()) == {"total_loss", "data_time", "rank_data_time"}


def test_metrics_are_gathered_every_period():
    trainer = make_trainer(gather_metric_period=4)
    trainer.train(0, 10)
    values = trainer.storage.history("total_loss").values()
    assert [iteration for _, iteration in values] == [3, 7]


def test_write_metrics_averages_over_processes(monkeypatch):
    """Two processes are played by answering what the second one would send."""

    def two_processes(mine):
        if isinstance(mine, dict):  # detectron2's own message
            return [mine, {"a": 5.0, "b": 1.0, "data_time": 0.75}]
        return [mine, (0.75, {"a": 5.0, "b": 1.0})]

    monkeypatch.setattr(comm, "gather", two_processes)
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    with EventStorage(7) as storage:
        SimpleTrainer.write_metrics(losses, 0.25, 6, "val_")
    latest = storage.latest()
    assert latest["rank_data_time"] == (0.25, 6)
    assert latest["data_time"] == (0.75, 6)
    assert latest["a"] == (3.0, 6)
    assert latest["b"] == (1.5, 6)
    assert latest["val_total_loss"] == (4.5, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=embedded_only)])
def test_a_non_finite_loss_stops_training(value, asynchronous):
    trainer = make_trainer((0.0, 0.0, value), async_write_metrics=asynchronous)
    with pytest.raises(FloatingPointError, match="2"):
        trainer.train(0, 10)
    assert trainer.iter == (3 if asynchronous else 2)


@embedded_only
def test_a_non_finite_loss_in_the_last_asynchronous_write_is_not_lost():
    trainer = make_trainer((0.0, float("nan")), async_write_metrics=True)
    with pytest.raises(FloatingPointError, match="iteration 1 is loss = nan"):
        trainer.train(0, 2)


def test_asynchronous_metrics_equal_synchronous_ones():
    histories = []
    for asynchronous in (False, True):
        trainer = make_trainer((0.0, 1.0, 2.0), async_write_metrics=asynchronous)
        trainer.train(0, 12)
        histories.append(trainer.storage.history("total_loss").values())
    assert histories[0] == histories[1]
    assert len(histories[0]) == 12


def test_asynchronous_metrics_are_written_in_another_thread(monkeypatch):
    threads = set()
    write = SimpleTrainer.write_metrics

    def spy(*args, **kwargs):
        threads.add(threading.get_ident())
        return write(*args, **kwargs)

    monkeypatch.setattr(SimpleTrainer, "write_metrics", staticmethod(spy))
    make_trainer(async_write_metrics=True).train(0, 3)
    assert threads
    assert threading.get_ident() not in threads


def test_state_dict_restores_iteration_optimizer_and_hooks():
    class Stateful(HookBase):
        value = 0

        def after_step(self):
            self.value += 1

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    def build():
        model = Quadratic()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = SimpleTrainer(model, itertools.repeat(0.0), optimizer)
        hook = Stateful()
        trainer.register_hooks([Recorder([]), hook])
        return trainer, hook

    whole, _ = build()
    whole.train(0, 6)
    first, _ = build()
    first.train(0, 4)
    state = first.state_dict()
    assert set(state) == {"iteration", "hooks", "optimizer"}
    assert list(state["hooks"]) == [
        "test_state_dict_restores_iteration_optimizer_and_hooks.<locals>.Stateful"
    ]

    second, hook = build()
    second.load_state_dict(state)
    second.model.load_state_dict(first.model.state_dict())
    assert (second.iter, hook.value) == (4, 4)
    second.train(second.iter, 6)
    assert hook.value == 6
    assert torch.equal(second.model.w, whole.model.w)


def test_states_of_unknown_hooks_are_ignored():
    trainer = make_trainer()
    state = trainer.state_dict()
    assert "hooks" not in state
    trainer.load_state_dict({**state, "iteration": 5, "hooks": {"Gone": {"x": 1}}})
    assert trainer.iter == 5


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))
        self.dtype = None

    def forward(self, x):
        y = self.layers(x)
        self.dtype = y.dtype
        return {"loss": y.float().square().mean()}


def _run_amp(cls, **kwargs):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(4, 8, generator=generator) for _ in range(3)]
    trainer = make_trainer(data, cls=cls, model=TwoLayers(), lr=0.05, **kwargs)
    trainer.train(0, 6)
    return trainer


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@embedded_only  # the real one asserts CUDA
def test_amp_computes_in_low_precision_and_updates_in_full(precision):
    plain = _run_amp(SimpleTrainer)
    mixed = _run_amp(AMPTrainer, precision=precision)
    assert (plain.model.dtype, mixed.model.dtype) == (torch.float32, precision)
    for a, b in zip(plain.model.parameters(), mixed.model.parameters(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)
        assert not torch.equal(a, b)


@embedded_only  # the real one asserts CUDA
def test_amp_scale_is_logged_and_saved():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    trainer = _run_amp(
        AMPTrainer, grad_scaler=scaler, precision=torch.bfloat16, log_grad_scaler=True
    )
    scales = [v for v, _ in trainer.storage.history("[metric]grad_scaler").values()]
    assert scales == [8.0, 8.0, 16.0, 16.0, 32.0, 32.0]
    assert trainer.state_dict()["grad_scaler"]["scale"] == 64.0

    other = make_trainer(cls=AMPTrainer, model=TwoLayers())
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.get_scale() == 64.0


@embedded_only  # the real one asserts CUDA
def test_amp_skips_steps_with_infinite_gradients():
    model = Quadratic(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    trainer = make_trainer(cls=AMPTrainer, model=model, grad_scaler=scaler, lr=0.1)
    trainer.train(0, 1)
    assert model.w.item() == 1.0
    assert scaler.get_scale() == pytest.approx(1.5e38)


def test_amp_rejects_data_parallel():
    with pytest.raises(AssertionError):
        make_trainer(cls=AMPTrainer, model=nn.DataParallel(TwoLayers()))
