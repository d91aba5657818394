import json

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detrex.modeling import BasicStem, ResNet
from detrex.modeling.backbone.torchvision_resnet import (
    BackboneBase,
    FrozenBatchNorm2d,
    TorchvisionResNet,
)
from recorded_cases import RecordedCases, close, recipe_value
from torch import nn


@pytest.fixture(scope="module")
def cases(reference_dir):
    return RecordedCases(reference_dir / "detrex", "backbones")


def resnet50():
    return ResNet(
        BasicStem(norm="FrozenBN"),
        ResNet.make_default_stages(50, norm="FrozenBN", stride_in_1x1=False),
        out_features=["res2", "res3", "res4", "res5"],
        freeze_at=1,
    )


def resnet50_dc5():
    return TorchvisionResNet("resnet50", train_backbone=True, dilation=True)


def fill_by_recipe(model, seed):
    state = {}
    for key, value in model.state_dict().items():
        mean, std = 0.0, 0.1
        if value.dim() == 4:
            std = round(value[0].numel() ** -0.5, 6)
        elif key.endswith("running_var"):
            mean = 1.0
        elif key.endswith("weight"):
            mean = 0.8
        state[key] = recipe_value(key, value.shape, seed, mean, std)
    model.load_state_dict(state)


@pytest.mark.parametrize(
    ("case", "build"),
    [("full_r50_detrex_layout", resnet50), ("full_r50_dc5_torchvision_layout", resnet50_dc5)],
)
def test_full_size_outputs_are_the_recorded_ones(cases, case, build):
    facts, slices = cases.facts[case], cases.arrays(case, "out")
    model = build().eval()
    fill_by_recipe(model, facts["seed"])
    c, y, x = (torch.arange(n) for n in (3, *facts["input_hw"]))
    image = (37 * c[:, None, None] + 3 * y[:, None] + 5 * x) % 256
    with torch.no_grad():
        outputs = model((image[None] - 128.0) / 64)
    assert set(outputs) == set(facts["outputs"])
    for name, feature in outputs.items():
        expected = facts["outputs"][name]
        assert list(feature.shape) == expected["shape"]
        close(feature[0, :16, :4, :5], slices[f"{name}_slice"], atol=1e-4)
        statistics = [feature.mean(), feature.std(), feature.abs().max()]
        expected_statistics = [expected[key] for key in ("mean", "std", "abs_max")]
        assert [s.item() for s in statistics] == pytest.approx(expected_statistics, rel=1e-3)
    frozen = {n.split(".weight")[0] for n, p in model.named_parameters() if not p.requires_grad}
    for name in frozen:
        assert any(name.startswith(prefix) for prefix in facts["frozen_parameters"])
    assert len(frozen) >= len(facts["frozen_parameters"])


@pytest.mark.parametrize(
    "config", ["conditional_detr_r50_dc5_50ep", "conditional_detr_r101_dc5_50ep"]
)
def test_dc5_has_the_published_keys(reference_dir, config):
    file = reference_dir / "detrex" / "checkpoint_keys" / f"{config}.json"
    recorded = {
        name.removeprefix("backbone."): entry
        for name, entry in json.loads(file.read_text())["keys"].items()
        if name.startswith("backbone.")
    }
    name = "resnet101" if "r101" in config else "resnet50"
    with torch.device("meta"):
        model = TorchvisionResNet(name, train_backbone=True, dilation=True)
    kinds = {name: "p" if p.requires_grad else "f" for name, p in model.named_parameters()}
    actual = {k: [kinds.get(k, "b"), list(v.shape)] for k, v in model.state_dict().items()}
    assert actual == recorded


def test_both_layouts_compute_the_same():
    """The two networks share nothing but the architecture."""
    ours = ResNet(BasicStem(norm="FrozenBN"), ResNet.make_default_stages(18, norm="FrozenBN"))
    theirs = TorchvisionResNet("resnet18", train_backbone=False)
    assert not any(p.requires_grad for p in theirs.parameters())
    state = theirs.state_dict()
    assert len(state) == len(ours.state_dict())
    ours.load_state_dict({detectron2_key(key): value for key, value in state.items()})
    x = torch.randn(1, 3, 64, 80)
    close(ours(x)["res5"], theirs(x)["res5"], atol=1e-4)


def detectron2_key(key):
    parts = key.removeprefix("body.").split(".")
    if parts[0] in ("conv1", "bn1"):
        parts = ["stem", *parts]
    else:
        parts[0] = f"res{int(parts[0][-1]) + 1}"
    key = ".".join(parts)
    for i in (1, 2, 3):
        key = key.replace(f"bn{i}", f"conv{i}.norm")
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def test_several_layers_are_returned_and_later_ones_left_out():
    model = TorchvisionResNet("resnet18", True, {"layer1": "res2", "layer3": "res4"})
    outputs = model(torch.randn(1, 3, 32, 32))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "res2": (1, 64, 8, 8),
        "res4": (1, 256, 2, 2),
    }
    assert not any("layer4" in key for key in model.state_dict())
    assert model.num_channels == 512
    with pytest.raises(ValueError):  # noqa: PT011
        BackboneBase(nn.Sequential(), True, 1, {"layer9": "res9"})
    with pytest.raises(NotImplementedError):
        TorchvisionResNet("resnet18", True, dilation=True)


def test_frozen_batch_norm_is_batch_norm_in_eval_mode():
    norm = nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight)
    norm(torch.randn(4, 3, 5, 5) * 2 + 1)
    frozen = FrozenBatchNorm2d(3)
    frozen.load_state_dict(norm.state_dict())
    x = torch.randn(2, 3, 4, 4)
    close(frozen(x), norm.eval()(x))
    assert not list(frozen.parameters())
    assert frozen(x.bfloat16()).isfinite().all()


def test_saved_configs_name_detrexs_classes(reference_dir):
    settings = json.loads((reference_dir / "detrex" / "training_settings.json").read_text())
    recorded = settings["configs"]["conditional_detr_r50_50ep"]["backbone"]
    for node, obj in [
        (recorded, ResNet),
        (recorded["stem"], BasicStem),
        (recorded["stages"], ResNet.make_default_stages),
    ]:
        assert f"{obj.__module__}.{obj.__qualname__}" == node["_target_"]
    stages = LazyCall(ResNet.make_default_stages)(depth=18, norm="FrozenBN")
    config = LazyCall(ResNet)(
        stem=LazyCall(BasicStem)(norm="FrozenBN"), stages=stages, out_features=["res3"]
    )
    assert list(instantiate(config).output_shape()) == ["res3"]
