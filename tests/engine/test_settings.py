"""Settings that cannot be used are refused in one line, before any work."""

import pytest
import torch
from omegaconf import OmegaConf
from tiny_run import metrics, run_tiny

from engine import building, checkpoint
from engine.errors import UserError


def fails(tmp_path, *overrides, **options):
    with pytest.raises(UserError) as caught:
        run_tiny(tmp_path / "out", *overrides, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert not (tmp_path / "out" / "config.yaml").exists()
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=4294967296", "train.seed is 4294967296, expected a whole number up to 42949"),
        ("train.device=null", "train.device is missing or null"),
        ("train.device=meta", "train.device is 'meta', expected auto, cpu or cuda"),
        ("train.model_ema={enabled: true, device: foo}", "train.model_ema.device is 'foo', expect"),
        ("train.model_ema={enabled: true, decay: 2}", "train.model_ema.decay is 2, expected 0 to"),
        ("train.clip_grad.params.max_norm=0", "train.clip_grad.params.max_norm is 0"),
        ("+train.clip_grad.params.foo=1", "cannot build the gradient clipping of train.clip_grad"),
        ("+train.checkpointer.foo=1", "cannot build train.checkpointer: TypeError: "),
        ("train.init_checkpoint=[a,b]", "train.init_checkpoint is ['a', 'b'], expected a path"),
        ("optimizer.lr=nan", "cannot build the optimizer: ValueError: Invalid learning rate: nan"),
        ("optimizer.lr=null", "cannot build the optimizer: TypeError: "),
        ("optimizer.betas=0.9", "cannot build the optimizer: TypeError: "),
        ("optimizer.params.base_lr=abc", "the optimizer has the lr 'abc', expected a number"),
        (
            "optimizer._target_=torch.optim.Foo",
            "cannot build the optimizer: ImportError: ",
        ),
        ("optimizer.params=null", "cannot build the optimizer: "),
        ("model._target_=x.Nope", "cannot build the model: ImportError: cannot locate 'x.Nope'"),
        ("model.num_classes=-3", "cannot build the model: RuntimeError: "),
        ("lr_multiplier.warmup_length=2", "cannot build lr_multiplier: "),
        ("dataloader.train.num_workers=-1", "num_workers is -1, expected a whole number from 0"),
        ("dataloader.train.dataset.names=null", "cannot load the data: TypeError: "),
        ("dataloader.train.mapper=null", "the training data's mapper is None, expected a callable"),
        ("dataloader.train=null", "dataloader.train is missing or null, expected a value"),
        ("~dataloader.test", "dataloader.test is missing or null, expected a value"),
        ("~train.max_iter", "train.max_iter is missing or null, expected a value"),
        ("train.amp=null", "train.amp.enabled is missing or null, expected a value"),
        ("evaluation=null", "evaluation is missing or null, expected a value"),
        ("train.max_iter=${train.foo}", "train.max_iter: Interpolation key 'train.foo' not found"),
        ("~model", "with these overrides the config has no 'model', expected model, "),
        ("train=null", "with these overrides the config has no 'train', expected model, "),
        ("+optimizer=5", "with these overrides the config has the value 5 as 'optimizer'"),
    ],
)
def test_refused(tmp_path, override, message):
    found = fails(tmp_path, override)
    assert found.startswith(message)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(UserError, match="cannot build it: ValueError: no 3") as caught:
        building.build("it", OmegaConf.create({"_target_": "test_settings.refuse", "value": 3}))
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ZeroDivisionError):
        building.build("it", OmegaConf.create({"_target_": "test_settings.refuse", "value": 0}))


def refuse(value):
    raise ValueError(f"no {value}") if 1 / value else None


def test_all_checkpoints_can_be_kept(tmp_path):
    run_tiny(tmp_path, "train.checkpointer.max_to_keep=null", "train.checkpointer.period=2")
    assert len(list(tmp_path.glob("model_0*.pth"))) == 6


@pytest.mark.parametrize(
    "path", ["R-50.pkl", "detectron2://none/R-50.pkl", "http://none/a.pth", "s3://none/a.pth"]
)
@pytest.mark.parametrize("eval_only", [False, True])
def test_missing_weights_are_missed_first(tmp_path, monkeypatch, path, eval_only):
    monkeypatch.setattr("engine.run.build_model", None)
    message = fails(tmp_path, f"train.init_checkpoint={path}", eval_only=eval_only)
    assert message.startswith(f"checkpoint {path} not found")


def test_a_download_that_fails_is_named(tmp_path, monkeypatch):
    """detectron2 downloads what is not there, and its errors need not say what."""

    def download(path):
        raise OSError("<urlopen error Name or service not known>\nmore")

    monkeypatch.setattr(checkpoint.PathManager, "get_local_path", download)
    message = fails(tmp_path, "train.init_checkpoint=http://none/a.pth")
    expected = "checkpoint http://none/a.pth not found: <urlopen error Name or service not known>"
    assert message == expected


def test_a_resumed_run_needs_no_initial_weights(tmp_path):
    run_tiny(tmp_path, "train.max_iter=3", "train.eval_period=0")
    run_tiny(tmp_path, "train.max_iter=4", "train.init_checkpoint=gone.pth", resume=True)
    assert 4 in metrics(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataloader.evaluator.dataset_name=nope", "data set 'nope' is not registered"),
        ("dataloader.evaluator.tasks=[segm]", "cannot build dataloader.evaluator: NotImplemented"),
        ("dataloader.evaluator.max_dets_per_image=abc", "cannot build dataloader.evaluator: Value"),
        ("dataloader.test.dataset.names=[tiny_train,tiny_train]", "cannot build dataloader.evalu"),
        (
            "dataloader.test.mapper.image_format=XYZ",
            "cannot build a sample of dataloader.test: Value",
        ),
    ],
)
def test_an_evaluation_that_would_fail_is_refused_before_training(tmp_path, override, message):
    assert fails(tmp_path, override).startswith(message)


def test_without_an_evaluator_nothing_is_evaluated(tmp_path, engine_log):
    overrides = ("dataloader.evaluator=null", "dataloader.test.mapper.image_format=XYZ")
    run_tiny(tmp_path, *overrides, "train.max_iter=2")
    assert "nothing is evaluated" in engine_log.text


def test_a_best_metric_that_is_none_is_told_once(tmp_path, engine_log):
    run_tiny(tmp_path, "train.best_metric=bbox/AP_50")
    warning = "'bbox/AP_50' is not among the results (did you mean 'bbox/AP"
    assert engine_log.text.count(warning) == 1
    assert not (tmp_path / "model_best.pth").exists()


def test_training_is_as_without_a_rehearsal(tmp_path, monkeypatch):
    run_tiny(tmp_path / "a", "train.max_iter=3")
    monkeypatch.setattr("engine.run.rehearse_evaluation", lambda config, model: None)
    run_tiny(tmp_path / "b", "train.max_iter=3")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    weights = [torch.load(tmp_path / name / "model_final.pth")["model"] for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
