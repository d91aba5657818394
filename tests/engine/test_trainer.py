"""One optimiser step at a time: precision, accumulation, clipping, averages, non-finite losses."""

import itertools
import logging

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from tiny_detector import TinyDetector
from tiny_run import metrics, run_tiny
from torch import nn

from engine.ema import ModelEma
from engine.errors import NonFiniteLoss, UserError, exit_code_of
from engine.hooks import EmaHook
from engine.reproduce import load_snapshot
from engine.rng import set_rng_state
from engine.run import build_model
from engine.trainer import DistillationTrainer, autocast_dtype


def image(seed):
    generator = torch.Generator().manual_seed(seed)
    truth = Instances((24, 32))
    truth.gt_boxes = Boxes(torch.rand(1, 4, generator=generator) * 20)
    truth.gt_classes = torch.tensor([seed % 3])
    pixels = torch.randint(0, 255, (3, 24, 32), generator=generator)
    return {"image": pixels, "instances": truth, "height": 24, "width": 32}


def batches(size, start=0):
    for first in itertools.count(start, size):
        yield [image(seed) for seed in range(first, first + size)]


def make(model=None, size=2, lr=0.1, **options):
    torch.manual_seed(0)
    model = model or TinyDetector(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return DistillationTrainer(model, batches(size), optimizer, **options)


def test_one_step_is_plain_gradient_descent():
    trainer = make()
    before = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
    reference = TinyDetector(dropout=0.0)
    reference.load_state_dict(trainer.model.state_dict())
    sum(reference(next(batches(2))).values()).backward()
    trainer.train(0, 1)
    for name, value in trainer.model.named_parameters():
        expected = before[name] - 0.1 * reference.get_parameter(name).grad
        torch.testing.assert_close(value, expected)


def test_accumulated_steps_equal_one_large_batch():
    large = make(size=6, log_period=1)
    small = make(size=2, accumulation_steps=3, log_period=1)
    for trainer in (large, small):
        trainer.train(0, 3)
    for key, value in large.model.named_parameters():
        torch.testing.assert_close(small.model.get_parameter(key), value)
    for name in ("total_loss", "loss_box", "loss_class", "grad_norm"):
        assert small.storage.history(name).values() == [
            (pytest.approx(value, rel=1e-5), iteration)
            for value, iteration in large.storage.history(name).values()
        ]


def test_gradients_are_clipped_and_the_norm_before_is_recorded():
    free, clipped = make(log_period=1), make(clip_grad={"max_norm": 0.01}, log_period=1)
    start = [p.detach().clone() for p in clipped.model.parameters()]
    free.train(0, 1)
    clipped.train(0, 1)
    step = torch.cat(
        [(p - q).flatten() for p, q in zip(clipped.model.parameters(), start, strict=True)]
    )
    assert step.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert clipped.storage.history("grad_norm").latest() == pytest.approx(
        free.storage.history("grad_norm").latest()
    )
    assert free.storage.history("grad_norm").latest() > 0.01


def test_total_is_the_sum_of_the_losses():
    trainer = make()
    trainer.train(0, 2)
    value = {k: trainer.storage.history(k).latest() for k in ("loss_box", "loss_class")}
    assert trainer.storage.history("total_loss").latest() == pytest.approx(sum(value.values()))


class Precision(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen = None

    def forward(self, batch):
        output = self.layer(torch.ones(2, 4))
        self.seen = output.dtype
        return {"loss": output.float().sum()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_mixed_precision_reaches_the_forward_pass(dtype):
    trainer = make(Precision(), amp_dtype=dtype)
    trainer.train(0, 2)
    assert trainer.model.seen == (dtype or torch.float32)
    assert trainer.model.layer.weight.dtype == torch.float32


def test_precision_names():
    assert autocast_dtype(False, "nonsense", "cpu") is None
    assert autocast_dtype(True, "bfloat16", "cpu") is torch.bfloat16
    assert autocast_dtype(True, "float16", "cuda") is torch.float16
    with pytest.raises(UserError, match="float16 needs CUDA"):
        autocast_dtype(True, "float16", "cpu")
    with pytest.raises(UserError, match="'half', expected one of bfloat16, float16"):
        autocast_dtype(True, "half", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_float16_scales_the_loss_and_keeps_the_scale():
    trainer = make(TinyDetector(dropout=0.0).cuda(), amp_dtype=torch.float16, log_period=1)
    trainer.grad_scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    trainer.train(0, 40)
    assert trainer.storage.history("grad_scale").latest() < 2.0**40
    other = make(TinyDetector(dropout=0.0).cuda(), amp_dtype=torch.float16)
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.get_scale() == trainer.grad_scaler.get_scale()


def test_average_follows_its_formula():
    trainer = make(lr=0.5)
    ema = ModelEma(trainer.model, decay=0.75)
    trainer.register_hooks([EmaHook(ema)])
    expected = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
    for iteration in range(3):
        trainer.train(iteration, iteration + 1)
        for key, value in trainer.model.named_parameters():
            expected[key] = 0.75 * expected[key] + 0.25 * value.detach()
    for key, value in expected.items():
        torch.testing.assert_close(ema.state_dict()[key], value)
    assert ema.state_dict()["calls"].item() == 3, "integer buffers are copied"
    own = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with ema.applied():
        torch.testing.assert_close(trainer.model.state_dict()["boxes.bias"], expected["boxes.bias"])
    assert all(torch.equal(v, own[k]) for k, v in trainer.model.state_dict().items())


def test_averages_have_their_own_results(tmp_path):
    results = run_tiny(tmp_path, "train.model_ema.enabled=True", "train.max_iter=2")
    assert set(results) == {"bbox", "ema"}
    assert {"bbox/AP", "ema/bbox/AP"} <= set(metrics(tmp_path)[2])


def test_compiling_keeps_the_keys_clean():
    compile_options = {"enabled": True, "options": {"backend": "eager"}}
    train = {"device": "cpu", "channels_last": False, "compile": compile_options}
    config = {"model": L(TinyDetector)(), "train": train}
    model = build_model(OmegaConf.create(config, flags={"allow_objects": True}))
    assert model._compiled_call_impl is not None
    assert model.state_dict().keys() == TinyDetector().state_dict().keys()


@pytest.mark.slow  # the compiler takes long to import
def test_a_compiled_model_has_the_same_losses(tmp_path):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    settings = ("train.max_iter=2", "model.dropout=0.0")
    run_tiny(plain, *settings)
    run_tiny(
        compiled, *settings, "train.compile.enabled=True", "train.compile.options={backend: eager}"
    )
    assert float(metrics(compiled)[1]["total_loss"]) == pytest.approx(
        float(metrics(plain)[1]["total_loss"]), rel=1e-6
    )


def test_nonfinite_loss_names_it_and_can_be_reproduced(tmp_path):
    with pytest.raises(NonFiniteLoss) as caught:
        run_tiny(tmp_path, "model.nan_at=3", "model.dropout=0.5")
    message = str(caught.value)
    path = tmp_path / "nonfinite_0000003.pth"
    assert message.startswith("loss not finite at iteration 3: loss_box = nan")
    assert str(path) in message
    assert "\n" not in message
    snapshot = load_snapshot(path)
    model = TinyDetector(dropout=0.5)
    model.load_state_dict(snapshot["model"])
    set_rng_state(snapshot["rng"])
    losses = model.train()(snapshot["batch"])
    assert losses["loss_class"].item() == snapshot["losses"]["loss_class"]
    assert {"optimizer", "iteration"} <= set(snapshot["trainer"])


def test_the_step_before_a_nonfinite_loss_is_the_last(tmp_path):
    with pytest.raises(FloatingPointError):
        run_tiny(tmp_path, "model.nan_at=2")
    weights = load_snapshot(tmp_path / "nonfinite_0000002.pth")["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not list(tmp_path.glob("model_*.pth"))


def test_errors_are_one_line_without_traceback(capfd):
    def fail():
        raise UserError(
            "Caught UserError in worker 0.\nTraceback ...\nengine.errors.UserError: bad x"
        )

    assert exit_code_of(fail) == 2
    assert capfd.readouterr().err == "error: bad x\n"
    with pytest.raises(UserError):
        exit_code_of(fail, traceback=True)
    assert exit_code_of(lambda: None) == 0


def test_a_model_without_losses_is_an_error():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, batch):
            return {}

    logging.disable()
    with pytest.raises(UserError, match="Nothing returned no losses"):
        make(Nothing()).train(0, 1)
    logging.disable(logging.NOTSET)
    with pytest.raises(UserError, match="accumulation_steps is 0"):
        make(accumulation_steps=0)
