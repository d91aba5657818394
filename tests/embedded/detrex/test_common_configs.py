import inspect
import json

import pytest
from detectron2.config import instantiate
from detrex.config import get_config, try_get_key
from omegaconf import DictConfig, ListConfig, OmegaConf

FILES = [
    "common/coco_schedule.py",
    "common/data/coco.py",
    "common/data/coco_detr.py",
    "common/data/constants.py",
    "common/data/custom.py",
    "common/optim.py",
    "common/train.py",
]


@pytest.fixture(scope="module")
def recorded(reference_dir):
    return json.loads((reference_dir / "detrex" / "api.json").read_text())["common_configs"]


def as_recorded(node):
    """Write a config the way the recorded ones are written."""
    if isinstance(node, DictConfig):
        return {
            str(key): "interpolation " + node._get_node(key)._value()
            if OmegaConf.is_interpolation(node, key)
            else as_recorded(node[key])
            for key in node
        }
    if isinstance(node, (ListConfig, tuple)):
        return [as_recorded(value) for value in node]
    if callable(node):
        return f"<{node.__module__}.{node.__qualname__}>"
    return node


def target_named(value):
    """Bring classes and their dotted names to one form."""
    if isinstance(value, dict):
        return {
            k: f"<{v.strip('<>')}>" if k == "_target_" else target_named(v)
            for k, v in value.items()
        }
    return [target_named(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("file", FILES)
def test_every_setting_is_the_recorded_one(recorded, file):
    config = get_config(file)
    assert target_named(as_recorded(config)) == recorded[file]["values"]


def test_schedule_functions_have_the_recorded_signatures(recorded):
    from detrex.config.configs.common import coco_schedule, common_schedule

    for module, file in [
        (coco_schedule, "common/coco_schedule.py"),
        (common_schedule, "common/common_schedule.py"),
    ]:
        for name, signature in recorded[file]["functions"].items():
            assert str(inspect.signature(getattr(module, name))) == signature


def test_schedules_have_their_shapes():
    from detrex.config.configs.common import common_schedule as schedules

    def curve(name, **kwargs):
        config = getattr(schedules, name)(num_updates=100, warmup_steps=0, **kwargs)
        multiplier = instantiate(config)
        return [multiplier(x) for x in (0.0, 0.5, 0.99)]

    assert curve("constant_lr_scheduler", value=0.3) == pytest.approx([0.3] * 3)
    linear = curve("linear_lr_scheduler", start_value=1.0, end_value=0.0)
    assert linear == pytest.approx([1, 0.5, 0.01])
    cosine = curve("cosine_lr_scheduler", start_value=1.0, end_value=0.0)
    assert cosine == pytest.approx([1, 0.5, 0.000247], abs=1e-5)
    exponential = curve("exponential_lr_scheduler", start_value=2.0, decay=0.25)
    assert exponential == pytest.approx([2, 1, 2 * 0.25**0.99])
    assert curve("step_lr_scheduler", values=[1.0, 0.5]) == pytest.approx([1, 0.5, 0.5])
    multistep = curve("multistep_lr_scheduler", milestones=[90])
    assert multistep == pytest.approx([1, 1, 0.1])
    gamma = {"base_value": 1.0, "num_decays": 1, "gamma": 0.1}
    assert curve("step_lr_scheduler_with_fixed_gamma", **gamma) == pytest.approx([1, 0.1, 0.1])
    warm = schedules.constant_lr_scheduler(1.0, num_updates=100, warmup_steps=10)
    assert instantiate(warm)(0.0) == pytest.approx(0.001)
    assert instantiate(warm)(0.2) == pytest.approx(1.0)


def test_loading_twice_gives_independent_configs():
    first = get_config("common/data/custom.py")
    first.dataloader.train.total_batch_size = 1
    assert get_config("common/data/coco_detr.py").dataloader.train.total_batch_size == 16
    assert (
        get_config("common/data/coco_detr.py").dataloader.train.dataset.names != "my_dataset_train"
    )


def test_unknown_config_is_an_error():
    with pytest.raises(RuntimeError, match="nothing"):
        get_config("common/nothing.py")


def test_try_get_key_takes_the_first_key_that_exists():
    config = OmegaConf.create({"a": {"b": 1, "none": None}})
    assert try_get_key(config, "x.y", "a.b") == 1
    assert try_get_key(config, "x", default=7) == 7
    assert try_get_key(config, "a.none", "a.b") is None
    assert try_get_key(config, "x") is None
