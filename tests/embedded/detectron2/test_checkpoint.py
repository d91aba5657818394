"""DetectionCheckpointer: formats, names, and files that must not be trusted."""

import logging
import pickle
from collections import OrderedDict

import detectron2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import Checkpointer, DetectionCheckpointer, PeriodicCheckpointer
from torch import nn

own_reader = pytest.mark.skipif(
    "embedded" not in detectron2.__file__, reason="the installed detectron2 unpickles anything"
)


def small_model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 3), "c": nn.Linear(3, 1)})


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape))).reshape(shape) + 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_model()


def load(model, path, **kwargs):
    return DetectionCheckpointer(model, **kwargs).load(str(path))


@pytest.mark.parametrize(
    ("content", "returned"),
    [
        ({"model": {"a.weight": numbers(3, 2)}}, set()),
        ({"a.weight": numbers(3, 2)}, set()),
        ({"module.a.weight": numbers(3, 2)}, set()),
        ({"a.weight": numbers(3, 2), "c.weight": numbers(2, 2)}, set()),
        ({"a.weight": numbers(3, 2), "x.y": numbers(1)}, set()),
        ({"model": {"a.weight": numbers(3, 2)}, "foo": 5}, {"foo"}),
    ],
    ids=["missing", "bare", "module", "shape", "unexpected", "extra"],
)
def test_pth(model, tmp_path, content, returned):
    torch.save(content, tmp_path / "x.pth")
    unchanged = model["c"].weight.clone()
    assert set(load(model, tmp_path / "x.pth")) == returned
    assert torch.equal(model["a"].weight, numbers(3, 2))
    assert torch.equal(model["c"].weight, unchanged)


def test_mismatches_are_reported(model, tmp_path, caplog):
    torch.save(
        {"a.weight": numbers(3, 2), "c.weight": numbers(2, 2), "x.y": numbers(1)},
        tmp_path / "x.pth",
    )
    load(model, tmp_path / "x.pth")
    for part in ("c.weight", "(2, 2)", "(1, 3)", "x.y", "a.bias"):
        assert part in caplog.text


def test_missing_normalisation_constants_are_not_reported(tmp_path, caplog):
    model = small_model()
    model.register_buffer("pixel_mean", torch.ones(3))
    torch.save({"a.weight": numbers(3, 2)}, tmp_path / "x.pth")
    load(model, tmp_path / "x.pth")
    assert "c.weight" in caplog.text or "c.{" in caplog.text
    assert "pixel_mean" not in caplog.text


def test_missing_file_and_empty_path(model, tmp_path):
    with pytest.raises(AssertionError, match=r"none\.pth"):
        load(model, tmp_path / "none.pth")
    assert load(model, "") == {}


def test_suffix_query(tmp_path):
    model = nn.ModuleDict({"backbone": small_model()})
    torch.save({"a.weight": numbers(3, 2)}, tmp_path / "x.pth")
    rest = load(model, f"{tmp_path}/x.pth?matching_heuristics=True")
    assert torch.equal(model["backbone"]["a"].weight, numbers(3, 2))
    assert rest == {"matching_heuristics": True}
    with pytest.raises(ValueError, match="colour"):
        load(model, f"{tmp_path}/x.pth?colour=red")


class TestSuffixes:
    def save(self, tmp_path, weights):
        content = {"model": weights, "__author__": "me", "matching_heuristics": True}
        with open(tmp_path / "x.pkl", "wb") as file:
            pickle.dump(content, file, protocol=2)
        return str(tmp_path / "x.pkl")

    def test_longest_name_wins_and_words_are_whole(self, tmp_path):
        model = nn.ModuleDict(
            {
                "conv": nn.Linear(1, 1),
                "body": nn.ModuleDict({"conv": nn.Linear(1, 1)}),
                "preconv": nn.Linear(1, 1),
            }
        )
        before = model["preconv"].weight.clone()
        weights = {"conv.weight": np.float32([[1]]), "body.conv.weight": np.float32([[2]])}
        rest = load(model, self.save(tmp_path, weights))
        assert rest["__author__"] == "me"
        assert model["conv"].weight.item() == 1
        assert model["body"]["conv"].weight.item() == 2
        assert torch.equal(model["preconv"].weight, before)

    def test_ambiguous_name(self, tmp_path):
        model = nn.ModuleDict({"x": small_model(), "y": small_model()})
        with pytest.raises(ValueError, match="model"):
            load(model, self.save(tmp_path, {"a.weight": np.ones((3, 2), np.float32)}))

    def test_wrong_shape_and_no_match_are_reported(self, tmp_path, caplog):
        model = nn.ModuleDict({"x": small_model()})
        weights = {"a.weight": np.ones((9, 9), np.float32), "a.bias": np.ones(3, np.float32)}
        load(model, self.save(tmp_path, weights))
        assert "(9, 9)" in caplog.text.replace("torch.Size([9, 9])", "(9, 9)")
        assert torch.equal(model["x"]["a"].bias, torch.ones(3))
        caplog.clear()
        load(model, self.save(tmp_path, {"nowhere": np.ones(1, np.float32)}))
        assert "nowhere" in caplog.text


class ConvNorm(nn.Module):
    """A convolution of one number with its normalisation, by detectron2's names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm2d(1)


def detector() -> nn.Module:
    """A model around a ResNet of two blocks per stage."""
    backbone = nn.ModuleDict({"stem": nn.ModuleDict({"conv1": ConvNorm()})})
    for stage, block in BLOCKS:
        convs = ["conv1", "conv2", "conv3"] + ([] if block else ["shortcut"])
        blocks = nn.ModuleList() if block == 0 else backbone[f"res{stage}"]
        blocks.append(nn.ModuleDict({conv: ConvNorm() for conv in convs}))
        backbone[f"res{stage}"] = blocks
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(1, 1)})


STATISTICS = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
BLOCKS = [(stage, block) for stage in (2, 3, 4, 5) for block in (0, 1)]


def torchvision_names() -> dict[str, str]:
    """Detectron2's names of a ResNet's parameters, by torchvision's."""
    names = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
    for stage, block in BLOCKS:
        theirs, ours = f"layer{stage - 1}.{block}", f"res{stage}.{block}"
        for i in (1, 2, 3):
            names[f"{theirs}.conv{i}"] = f"{ours}.conv{i}"
            names[f"{theirs}.bn{i}"] = f"{ours}.conv{i}.norm"
        if block == 0:
            names[f"{theirs}.downsample.0"] = f"{ours}.shortcut"
            names[f"{theirs}.downsample.1"] = f"{ours}.shortcut.norm"
    return {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in names.items()
        for kind in (STATISTICS if ours.endswith("norm") else ["weight"])
    }


def caffe2_names() -> dict[str, str]:
    """Detectron2's names of a ResNet's parameters, by Caffe2's."""
    names = {"conv1": "stem.conv1", "res_conv1_bn": "stem.conv1.norm"}
    for stage, block in BLOCKS:
        convs = {"2a": "conv1", "2b": "conv2", "2c": "conv3"} | ({} if block else {"1": "shortcut"})
        for branch, conv in convs.items():
            names[f"res{stage}_{block}_branch{branch}"] = f"res{stage}.{block}.{conv}"
            names[f"res{stage}_{block}_branch{branch}_bn"] = f"res{stage}.{block}.{conv}.norm"
    return {
        f"{theirs}_{short}": f"{ours}.{kind}"
        for theirs, ours in names.items()
        for kind, short in (STATISTICS.items() if ours.endswith("norm") else [("weight", "w")])
    }


def numbered(names: dict[str, str]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """A different number for every foreign name, and the same numbers by the model's names."""
    weights = {theirs: np.float32([i]) for i, theirs in enumerate(names, start=1)}
    return weights, {f"backbone.{ours}": weights[theirs].item() for theirs, ours in names.items()}


def assert_backbone(model, expected):
    state = model.state_dict()
    loaded = {k for k in state if k.startswith("backbone") and "num_batches" not in k}
    assert loaded == set(expected)
    assert {key: state[key].item() for key in expected} == expected


@own_reader
def test_torchvision_resnet(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    weights, expected = numbered(torchvision_names())
    weights = {key: torch.from_numpy(value) for key, value in weights.items()}
    weights |= {"fc.weight": numbers(4, 1), "bn1.num_batches_tracked": torch.tensor(3)}
    torch.save(OrderedDict(weights), tmp_path / "resnet.pth")
    model = detector()
    load(model, tmp_path / "resnet.pth")
    assert_backbone(model, expected)
    assert "head" in caplog.text, "what the file lacks is reported"


@own_reader
def test_torchvision_weights_in_a_model_with_torchvision_names(tmp_path):
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.conv1 = nn.Linear(1, 1, bias=False)
    model.backbone.layer1 = nn.Sequential(nn.ModuleDict({"conv1": nn.Linear(1, 1, bias=False)}))
    arrays, _ = numbered(torchvision_names())
    weights = {key: torch.from_numpy(value)[None] for key, value in arrays.items()}
    torch.save(weights, tmp_path / "resnet.pth")
    load(model, tmp_path / "resnet.pth")
    assert model.backbone.conv1.weight.item() == weights["conv1.weight"].item()
    assert model.backbone.layer1[0].conv1.weight.item() == weights["layer1.0.conv1.weight"].item()


@pytest.mark.parametrize("blobs", [False, True])
def test_caffe2_resnet(tmp_path, blobs):
    weights, expected = numbered(caffe2_names())
    content = dict(weights, conv1_w_momentum=np.zeros(1, np.float32))
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump({"blobs": content} if blobs else content, file, protocol=2)
    model = detector()
    load(model, tmp_path / "R-50.pkl")
    assert_backbone(model, expected)


def test_save_and_resume(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model["a"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saver = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    periodic = PeriodicCheckpointer(saver, period=2, max_iter=5, max_to_keep=1)
    for iteration in range(5):
        periodic.step(iteration)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"last_checkpoint", "model_0000003.pth", "model_final.pth"}

    other = small_model()
    fresh = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    loader = DetectionCheckpointer(other, str(tmp_path), optimizer=fresh)
    assert isinstance(loader, Checkpointer)
    assert loader.has_checkpoint()
    assert loader.resume_or_load("", resume=True)["iteration"] == 4
    assert torch.equal(other["a"].weight, model["a"].weight)
    assert fresh.param_groups[0]["lr"] == 0.1
    rest = loader.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)
    assert set(rest) == {"optimizer", "iteration"}


def test_only_the_main_process_saves(model, tmp_path, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    DetectionCheckpointer(model, str(tmp_path)).save("x")
    assert not list(tmp_path.iterdir())
    DetectionCheckpointer(model, str(tmp_path), save_to_disk=True).save("x")
    assert (tmp_path / "x.pth").exists()
