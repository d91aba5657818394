"""Configs as yaml: what is saved comes back, and loading never runs code."""

import types
from dataclasses import dataclass, field

import detectron2
import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.modeling.backbone.resnet import BasicBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import nn

NS = types.SimpleNamespace
EMBEDDED = "embedded" in detectron2.__file__
own_yaml = pytest.mark.skipif(not EMBEDDED, reason="the installed detectron2 writes python tags")


@dataclass
class Shape:
    """A dataclass for configs."""

    channels: int = 1
    sizes: list[int] = field(default_factory=lambda: [1, 2])


def round_trip(cfg, folder):
    file = str(folder / "config.yaml")
    LazyConfig.save(cfg, file)
    return LazyConfig.load(file)


def test_plain_values_interpolations_and_targets(tmp_path):
    cfg = DictConfig(
        {
            "train": {"x": 5, "lr": 1e-05, "s": "1e-4", "none": None, "y": {"z": [1, 2]}},
            "ref": "${train.x}",
            "model": LazyCall(NS)(a="ü", b="yes", c=[LazyCall(NS)(d=True)]),
        },
        flags={"allow_objects": True},
    )
    loaded = round_trip(cfg, tmp_path)
    assert OmegaConf.to_container(loaded.train) == OmegaConf.to_container(cfg.train)
    assert OmegaConf.to_container(loaded, resolve=False)["ref"] == "${train.x}"
    assert loaded.model._target_ == "types.SimpleNamespace"
    assert instantiate(loaded.model) == instantiate(cfg.model)
    assert cfg.model._target_ is NS, "saving must not change the config"


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("01e-+.:~!&*#{}[],'\"\\ \nyesnoabü", max_size=6)
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_plain_data_comes_back(tmp_path_factory, value):
    cfg = OmegaConf.create({"value": value})
    loaded = round_trip(cfg, tmp_path_factory.mktemp("yaml"))
    assert OmegaConf.to_container(loaded) == OmegaConf.to_container(cfg)


@own_yaml
def test_classes_and_functions_as_values(tmp_path):
    cfg = LazyCall(NS)(norm=nn.LayerNorm, f=nn.functional.relu, inner=[LazyCall(NS)(act=nn.GELU)])
    loaded = instantiate(round_trip(cfg, tmp_path))
    assert loaded.norm is nn.LayerNorm
    assert loaded.f is nn.functional.relu
    assert loaded.inner[0].act is nn.GELU


def test_dataclasses(tmp_path):
    cfg = LazyCall(NS)(shape=Shape(7), shapes={"res3": Shape(3, [4])})
    loaded = round_trip(cfg, tmp_path)
    assert instantiate(loaded).shape == Shape(7)
    assert instantiate(loaded).shapes.res3.channels == 3
    assert instantiate(loaded).shapes.res3.sizes == [4]


@own_yaml
@pytest.mark.parametrize(
    "value",
    [lambda x: x, torch.zeros(1), NS(), nn.ReLU()],
    ids=["lambda", "tensor", "object", "module"],
)
def test_what_cannot_be_saved_is_said_clearly(tmp_path, caplog, value):
    cfg = DictConfig({"a": {"b": [1, value]}, "c": 4}, flags={"allow_objects": True})
    file = tmp_path / "config.yaml"
    LazyConfig.save(cfg, str(file))
    assert "a.b[1]" in caplog.text
    assert "c: 4" in file.read_text(), "the rest stays readable"
    with pytest.raises(ValueError, match=r"config\.yaml, line \d.*not_saved"):
        LazyConfig.load(str(file))


@own_yaml
@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {flag}']",
        "a: !!python/object/new:os.system ['touch {flag}']",
        "a: !!python/object:os.system ['touch {flag}']",
        "a: [!!python/tuple [1, 2]]",
    ],
)
def test_loading_runs_no_code(tmp_path, text):
    flag = tmp_path / "flag"
    (tmp_path / "evil.yaml").write_text(text.format(flag=flag))
    with pytest.raises(ValueError, match=r"evil\.yaml, line 1: .*python") as info:
        LazyConfig.load(str(tmp_path / "evil.yaml"))
    assert "\n" not in str(info.value)
    assert not flag.exists()


# as in the config.yaml of a run on the real detectron2
REAL = """
model:
- _target_: types.SimpleNamespace
  block_class: &id001 !!python/name:detectron2.modeling.backbone.resnet.BasicBlock ''
- _target_: types.SimpleNamespace
  block_class: *id001
  shapes:
    res4: !!python/object:detectron2.layers.shape_spec.ShapeSpec {channels: 8, height: null, \
stride: 16, width: null}
"""


def test_files_of_the_real_detectron2_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text(REAL)
    first, second = instantiate(LazyConfig.load(str(tmp_path / "config.yaml")).model)
    assert first.block_class is second.block_class is BasicBlock
    shape = second.shapes["res4"]
    assert (shape.channels, shape.stride) == (8, 16)


@own_yaml
def test_reading_names_imports_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "a: !!python/name:no_such_module.f ''\nb: !!python/object:no_such_module.C {c: 1}\n"
    )
    loaded = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert loaded.a == {"_target_": "detectron2.utils.registry.locate", "name": "no_such_module.f"}
    assert loaded.b == {"_target_": "no_such_module.C", "c": 1}


def test_hand_written_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("a: {b: 1}\nl: [1, 2]\ns: text\n")
    assert LazyConfig.load(str(tmp_path / "c.yaml")) == {"a": {"b": 1}, "l": [1, 2], "s": "text"}
    assert LazyConfig.load(str(tmp_path / "c.yaml"), keys="a") == {"b": 1}


@own_yaml
def test_broken_yaml_is_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(ValueError, match=r"c\.yaml") as info:
        LazyConfig.load(str(tmp_path / "c.yaml"))
    assert "\n" not in str(info.value)


def test_a_file_is_saved_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    LazyConfig.save({"a": 1}, str(path))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        LazyConfig.save({"a": 2}, str(path))
    assert LazyConfig.load(str(path)) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
