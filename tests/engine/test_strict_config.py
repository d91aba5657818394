"""Overrides are applied, or refused with a line that helps."""

from pathlib import Path

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from omegaconf import DictConfig, OmegaConf

from engine.config import apply_overrides, load_config
from engine.defaults import TRAIN_DEFAULTS
from engine.errors import UserError

CONFIG = Path(__file__).with_name("tiny_config.py")


def head(width, depth=2, *, activation="relu"):
    return width, depth, activation


def anything(**options):
    return options


class Base:
    def __init__(self, *, width, depth=2):
        self.size = width, depth


class Derived(Base):
    def __init__(self, *, heads=1, **base):
        super().__init__(**base)
        self.heads = heads


@pytest.fixture
def config():
    return OmegaConf.create(
        {
            "train": {
                "max_iter": 10,
                "lr": 1e-3,
                "amp": {"enabled": False},
                "output_dir": "out",
                "steps": [1, 2, 3],
                "names": ["a", "b"],
                "hook": None,
                "free": {},
            },
            "model": L(head)(width=4),
            "other": L(anything)(a=1),
            "layers": [{"size": 1}, {"size": 2}],
            "copy": "${train.max_iter}",
        },
        flags={"allow_objects": True},
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_iter=20", "train.max_iter", 20),
        ("train.max_iter=2e3", "train.max_iter", 2000),
        ("train.lr=1", "train.lr", 1.0),
        ("train.amp.enabled=true", "train.amp.enabled", True),
        ("train.output_dir=2024", "train.output_dir", "2024"),
        ("train.output_dir=/a/b", "train.output_dir", "/a/b"),
        ("train.output_dir=null", "train.output_dir", None),
        ("train.steps=[4]", "train.steps", [4]),
        ("train.steps.1=9", "train.steps", [1, 9, 3]),
        ("train.names=c", "train.names", "c"),
        ("train.hook={a: 1}", "train.hook", {"a": 1}),
        ("train.free.new=1", "train.free", {"new": 1}),
        ("train.amp={enabled: true}", "train.amp", {"enabled": True}),
        ("layers.1.size=5", "layers", [{"size": 1}, {"size": 5}]),
        ("layers[0].size=5", "layers", [{"size": 5}, {"size": 2}]),
        ("model.depth=3", "model.depth", 3),
        ("model.width=null", "model.width", None),
        ("other.b=3", "other.b", 3),
        ("+train.extra=3", "train.extra", 3),
        ("+train.deep.er=3", "train.deep", {"er": 3}),
        ("copy=5", "copy", 5),
        ("train.lr=${copy}", "train.lr", 10),
    ],
)
def test_accepted(config, override, key, value):
    apply_overrides(config, [override])
    found = OmegaConf.select(config, key)
    found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    assert found == value
    assert type(found) is type(value)


def test_deleted(config):
    apply_overrides(config, ["~train.amp", "~layers.0"])
    assert "amp" not in config.train
    assert config.layers == [{"size": 2}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_itr=1", "unknown key 'train.max_itr' (did you mean 'train.max_iter'?)"),
        ("trian.max_iter=1", "unknown key 'trian.max_iter' (did you mean 'train.max_iter'?)"),
        ("max_iter=1", "unknown key 'max_iter' (did you mean 'train.max_iter'?)"),
        ("model.activaton=1", "unknown key 'model.activaton' (did you mean 'model.activation'?)"),
        ("train.max_iter.x=1", "unknown key 'train.max_iter.x': 'train.max_iter' is the value 10"),
        ("layers.2.size=1", "unknown key 'layers.2.size': 'layers' is a list of 2"),
        ("layers.0.sise=1", "unknown key 'layers.0.sise' (did you mean 'layers.0.size'?)"),
        ("~train.amq", "unknown key 'train.amq' (did you mean 'train.amp'?)"),
        ("train.max_iter=abc", "train.max_iter='abc' is of type str, expected int"),
        ("train.max_iter=1.5", "train.max_iter=1.5 is of type float, expected int"),
        ("train.max_iter=true", "train.max_iter=True is of type bool, expected int"),
        ("train.max_iter=null", "train.max_iter=None is of type NoneType, expected int"),
        ("train.lr=[1]", "train.lr=[1] is of type list, expected float"),
        ("train.amp.enabled=1", "train.amp.enabled=1 is of type int, expected bool"),
        ("train.amp=1", "train.amp=1 is of type int, expected dict"),
        ("train.steps=a", "train.steps='a' is of type str, expected list"),
        ("train.max_iter", "cannot read the override 'train.max_iter'"),
        ("--resume", "cannot read the override '--resume': options come before the overrides"),
        ("=3", "cannot read the override '=3': expected key=value"),
        ("@foo=3", "cannot read the override '@foo=3': expected key=value"),
        ("train.steps=[1,", "cannot read the override 'train.steps=[1,'"),
    ],
)
def test_refused(config, override, message):
    before = OmegaConf.to_yaml(config.train)
    with pytest.raises(UserError) as caught:
        apply_overrides(config, [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert OmegaConf.to_yaml(config.train) == before


def test_no_suggestion_is_the_key_itself_cut_short(config):
    with pytest.raises(UserError) as caught:
        apply_overrides(config, ["model.foo=1"])
    assert "did you mean 'model'?" not in str(caught.value)


def test_agrees_with_detectron2_where_that_is_strict_enough(config):
    overrides = ["train.max_iter=7", "train.steps=[5,6]", "model.width=9", "train.amp.enabled=True"]
    theirs = LazyConfig.apply_overrides(OmegaConf.create(config), overrides)
    assert apply_overrides(config, overrides) == theirs


COMPLETE = "model = dataloader = optimizer = lr_multiplier = dict()\ntrain = dict(max_iter=3)\n"


def test_a_constructor_that_passes_keywords_on_takes_those_of_its_base():
    config = OmegaConf.create({"model": L(Derived)(width=4)}, flags={"allow_objects": True})
    assert apply_overrides(config, ["model.depth=3", "model.heads=2"]).model.depth == 3
    with pytest.raises(UserError, match=r"unknown key 'model.deph' \(did you mean 'model.depth'"):
        apply_overrides(config, ["model.deph=3"])


def test_loading_completes_the_train_node(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(COMPLETE)
    config = load_config(str(path), ["train.accumulation_steps=2"])
    assert config.train.max_iter == 3
    assert config.train.accumulation_steps == 2
    assert config.train.amp.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config file .*config.py not found"),
        ("model = (", "cannot load config .*config.py"),
        ("import no_such_module", "No module named 'no_such_module'"),
        (COMPLETE.replace("= optimizer", ""), "has no 'optimizer', expected model"),
        ("a = 1\nb = c\n", r"config.py: line 2: NameError: name 'c' is not defined"),
        ("a = {}\n\n\na['x']", r"config.py: line 4: KeyError: 'x'"),
        ("import os\nos.nothing", r"config.py: line 2: AttributeError: module 'os' has no"),
        ("assert False", r"config.py: line 1: AssertionError$"),
    ],
)
def test_config_files_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_the_line_is_found_where_the_file_has_no_name(tmp_path, monkeypatch):
    """As detectron2 leaves it: it names the files alone that others import."""
    path = tmp_path / "config.py"
    path.write_text("a = 1\nb = c\n")

    def load(path):
        names = {"__file__": path, "__package__": "detectron2._cfg_loader.x"}
        exec(compile(Path(path).read_text(), path, "exec"), names)

    monkeypatch.setattr(LazyConfig, "load", load)
    with pytest.raises(UserError, match=r"config\.py: line 2: NameError: name 'c' is not defined"):
        load_config(str(path))


def test_no_config_file():
    with pytest.raises(UserError, match="use --config-file"):
        load_config("")


def test_common_settings_are_detrexs_and_ours():
    from detrex.config import get_config

    path = Path(__file__).parents[2] / "configs" / "common" / "train.py"
    train = LazyConfig.load(str(path)).train
    theirs = set(get_config("common/train.py").train) - {"wandb"}  # there is no such writer
    assert set(train) == theirs | set(TRAIN_DEFAULTS)
    assert train.clip_grad.params.max_norm == 0.1
    assert train.amp == {"enabled": False, "dtype": "bfloat16"}
    assert train.device == "auto"


def test_an_error_names_the_file_it_arose_in(tmp_path):
    (tmp_path / "other.py").write_text("\n1 / 0\n")
    (tmp_path / "config.py").write_text("from .other import a\n")
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "config.py"))
    assert str(caught.value) == (
        f"cannot load config {tmp_path}/config.py: {tmp_path}/other.py, line 2: "
        "ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize("node", ["", "model:", "{model: 1, dataloader: {}}", "{train: null}"])
def test_yaml_without_the_nodes(tmp_path, node):
    (tmp_path / "config.yaml").write_text(node)
    with pytest.raises(
        UserError, match=r"config .*config.yaml (holds no|has no|has the)"
    ) as caught:
        load_config(str(tmp_path / "config.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.txt", "a"), ("config.yaml", "a: [1"), ("config.yaml", "a: b: c"), ("c.yaml", "- 1")],
)
def test_files_that_are_no_configs(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"config .*{name}") as caught:
        load_config(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ['{flag}']",
        "!!python/object/new:os.mkdir ['{flag}']",
        "!!python/object:os.mkdir {{}}",
        "!!python/module:antigravity",
        "[1, {{b: !<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{flag}']}}]",
        "1\n--- !!python/object/apply:os.mkdir ['{flag}']",
        "!not_saved a Tensor",
    ],
)
def test_a_yaml_that_calls_while_it_is_read_is_refused(tmp_path, value):
    path, flag = tmp_path / "config.yaml", tmp_path / "made"
    path.write_text("train: {}\na: " + value.format(flag=flag))
    with pytest.raises(UserError, match=r"config\.yaml, line [23]: the tag !\S* is ref") as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)
    assert not flag.exists()


def test_a_saved_yaml_is_read(tmp_path):
    config = load_config(str(CONFIG))
    config.model.shape = ShapeSpec(channels=3)
    config.model.function = Path
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    model = load_config(str(tmp_path / "config.yaml")).model
    assert model.shape.channels == 3
    found = model.function
    assert (instantiate(found) if isinstance(found, DictConfig) else found) is Path
