"""LazyCall, instantiate, and configs written in Python."""

import dataclasses
import functools
import json
import types

import detectron2
import pytest
from detectron2.config import LazyCall, LazyConfig, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ValidationError
from torch import nn

NS = types.SimpleNamespace
EMBEDDED = "embedded" in detectron2.__file__


@dataclasses.dataclass
class Size:
    """A dataclass for configs."""

    height: int = 1
    width: int = 2


class TestLazyCall:
    def test_is_a_config_that_keeps_the_callable(self):
        cfg = LazyCall(NS)(a=1, c=[LazyCall(NS)(x=1)])
        assert isinstance(cfg, DictConfig)
        assert list(cfg) == ["a", "c", "_target_"]
        assert cfg._target_ is NS

    def test_string_and_dataclass_targets_are_names(self):
        assert LazyCall("types.SimpleNamespace")(a=1)._target_ == "types.SimpleNamespace"
        assert LazyCall(Size)()._target_.endswith("Size")
        assert instantiate(LazyCall(Size)(width=5)) == Size(1, 5)

    def test_rejects_what_is_no_call(self):
        with pytest.raises(TypeError, match="5"):
            LazyCall(5)
        with pytest.raises(TypeError):
            LazyCall(NS)(1)
        with pytest.raises(ValidationError):  # omegaconf cannot hold the type dict
            LazyCall(dict)(a=1)


class TestInstantiate:
    def test_builds_arguments_and_lists_first(self):
        built = instantiate(LazyCall(NS)(a=1, c=[LazyCall(NS)(x=1)]))
        assert built.a == 1
        assert isinstance(built.c, ListConfig)
        assert built.c[0] == NS(x=1)

    def test_does_not_look_into_plain_dicts(self):
        cfg = LazyCall(NS)(d={"p": 1, "q": LazyCall(NS)(z=2)}, t=(1, 2))
        built = instantiate(cfg)
        assert isinstance(built.d, DictConfig)
        assert built.d.q._target_ is NS
        assert built.t == [1, 2]
        plain = DictConfig({"m": {"_target_": "types.SimpleNamespace", "k": 1}})
        assert instantiate(plain) is plain

    def test_python_lists_and_values(self):
        assert instantiate([LazyCall(NS)(x=1), 2]) == [NS(x=1), 2]
        assert instantiate(5) == 5
        assert isinstance(instantiate(ListConfig([1])), ListConfig)

    def test_string_target_interpolation_and_assignment(self):
        assert instantiate({"_target_": "types.SimpleNamespace", "k": 3}) == NS(k=3)
        cfg = DictConfig({"x": 4, "m": LazyCall(NS)(y="${..x}")}, flags={"allow_objects": True})
        cfg.m.new = 3
        assert instantiate(cfg.m) == NS(y=4, new=3)

    def test_target_may_itself_be_built(self):
        cfg = DictConfig(
            {"_target_": LazyCall(make_partial)(), "b": 2}, flags={"allow_objects": True}
        )
        assert instantiate(cfg) == NS(a=1, b=2)

    def test_structured_config_becomes_its_dataclass(self):
        cfg = DictConfig({"s": Size(3, 4)}, flags={"allow_objects": True})
        assert isinstance(cfg.s, DictConfig)
        assert instantiate(cfg.s) == Size(3, 4)
        assert isinstance(instantiate(cfg.s), Size)

    def test_names_that_are_no_module_attribute_paths(self):
        layer = instantiate(
            {"_target_": "torch.nn.modules.linear.Linear", "in_features": 2, "out_features": 3}
        )
        assert isinstance(layer, nn.Linear)

    @pytest.mark.parametrize(
        ("target", "error"),
        [
            ("no_such_module.f", ImportError),
            ("torch.nn.NoSuchLayer", ImportError),
            ("math.pi", AssertionError),
        ],
    )
    def test_bad_target(self, target, error):
        with pytest.raises(error) as info:
            instantiate({"_target_": target})
        if EMBEDDED:
            assert target in str(info.value)
            assert "\n" not in str(info.value)

    def test_wrong_argument_is_logged_with_the_target(self, caplog):
        with pytest.raises(TypeError):
            instantiate({"_target_": "collections.OrderedDict.fromkeys", "nonsense": 1})
        assert "fromkeys" in caplog.text


def make_partial():
    return functools.partial(NS, a=1)


@pytest.fixture
def config_folder(tmp_path):
    (tmp_path / "a.py").write_text(
        "import math\n"
        "from types import SimpleNamespace as NS\n"
        "from detectron2.config import LazyCall\n"
        "from .b import train, extra\n"
        "train.x = 5\n"
        "model = LazyCall(NS)(q=math.pi, r=train.x)\n"
        "_hidden = dict(z=1)\n"
        "num = 3\n"
        "lst = [1, 2]\n"
        "func = lambda x: x\n"
    )
    (tmp_path / "b.py").write_text("train = dict(x=1, y=dict(z=[1, 2]))\nextra = dict(k='v')\n")
    return tmp_path


class TestLoadPython:
    def test_keeps_configs_only(self, config_folder):
        cfg = LazyConfig.load(str(config_folder / "a.py"))
        assert list(cfg) == ["train", "extra", "model"]
        assert cfg.train == {"x": 5, "y": {"z": [1, 2]}}
        assert cfg.model.r == 5
        assert isinstance(cfg.extra, DictConfig)

    def test_keys(self, config_folder):
        file = str(config_folder / "a.py")
        assert LazyConfig.load(file, keys="train") == {"x": 5, "y": {"z": [1, 2]}}
        train, model = LazyConfig.load(file, keys=("train", "model"))
        assert isinstance(train, DictConfig)
        assert isinstance(model, DictConfig)
        assert LazyConfig.load(file, keys="num") == 3
        with pytest.raises(KeyError, match="nothing"):
            LazyConfig.load(file, keys="nothing")

    def test_every_load_is_independent(self, config_folder):
        first = LazyConfig.load(str(config_folder / "a.py"))
        first.train.x = 77
        assert LazyConfig.load(str(config_folder / "a.py")).train.x == 5

    def test_imports_are_relative_to_the_file(self, tmp_path, monkeypatch):
        (tmp_path / "common" / "data").mkdir(parents=True)
        (tmp_path / "models").mkdir()
        (tmp_path / "common" / "data" / "coco.py").write_text("loader = dict(batch=2)\n")
        (tmp_path / "common" / "train.py").write_text(
            "from .data.coco import loader\ntrain = dict(loader=loader, device='cpu')\n"
        )
        (tmp_path / "models" / "m.py").write_text("from ..common.train import train\n")
        expected = {"train": {"loader": {"batch": 2}, "device": "cpu"}}
        assert LazyConfig.load(str(tmp_path / "models" / "m.py")) == expected
        monkeypatch.chdir(tmp_path)
        assert LazyConfig.load("models/m.py") == expected
        if EMBEDDED:  # an installed detectron2 stops at the current folder
            monkeypatch.chdir(tmp_path / "models")
            assert LazyConfig.load("m.py") == expected

    @pytest.mark.skipif(not EMBEDDED, reason="an installed detectron2 recurses without end")
    def test_import_cycle(self, tmp_path):
        (tmp_path / "x.py").write_text("from .y import b\na = {}\n")
        (tmp_path / "y.py").write_text("from .x import a\nb = {}\n")
        with pytest.raises(ImportError, match=r"x\.py -> .*y\.py -> .*x\.py"):
            LazyConfig.load(str(tmp_path / "x.py"))

    def test_load_rel(self, config_folder):
        (config_folder / "sub").mkdir()
        (config_folder / "sub" / "c.py").write_text(
            "from detectron2.config import LazyConfig\n"
            "train = LazyConfig.load_rel('../b.py', 'train')\n"
        )
        assert LazyConfig.load(str(config_folder / "sub" / "c.py")).train.x == 1

    def test_ordinary_imports_are_untouched(self, config_folder):
        LazyConfig.load(str(config_folder / "a.py"))
        with pytest.raises(ImportError):
            exec("from .b import train", {"__name__": "x", "__file__": str(config_folder / "x.py")})

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("model = dict(", SyntaxError, "bad.py"),
            ("from .missing import x", ImportError, "missing"),
            ("from .folder import x", ImportError, "folder"),
            ("from . import b", ImportError, "a folder|directories"),
        ],
    )
    def test_bad_file(self, config_folder, text, error, message):
        (config_folder / "folder").mkdir()
        (config_folder / "bad.py").write_text(text + "\n")
        with pytest.raises(error, match=message):
            LazyConfig.load(str(config_folder / "bad.py"))

    def test_bad_path(self, config_folder):
        with pytest.raises(FileNotFoundError):
            LazyConfig.load(str(config_folder / "none.py"))
        with pytest.raises(ValueError, match="json"):
            LazyConfig.load(str(config_folder / "x.json"))


def test_to_py():
    if not EMBEDDED:
        pytest.importorskip("black")
    cfg = DictConfig(
        {"a": {"b": 1, "c": [1, "x"]}, "m": LazyCall(NS)(k=2, n={"p": None})},
        flags={"allow_objects": True},
    )
    lines = [
        "cfg.a.b = 1",
        'cfg.a.c = [1, "x"]',
        'cfg.m = types.SimpleNamespace(k=2, n={"p": None})',
    ]
    assert LazyConfig.to_py(cfg) == "\n".join(lines) + "\n"
    with pytest.raises(AttributeError):
        LazyConfig.to_py(OmegaConf.create({"m": {"_target_": "types.SimpleNamespace"}}))


def test_recorded_facts_are_the_ones_tested_here(reference_dir):
    """The cases above restate these; a new recording must not silently disagree."""
    facts = json.loads((reference_dir / "detrex" / "runtime.json").read_text())["lazy_config"]
    assert facts["load a.py"]["keys"] == ["train", "extra", "model"]
    assert facts["instantiate unknown target"] == {"raises": "ImportError"}
    assert facts["instantiate not callable"] == {"raises": "AssertionError"}
    assert facts["load missing key"] == {"raises": "KeyError"}
    assert facts["LazyCall of the type dict, called"] == {"raises": "ValidationError"}
