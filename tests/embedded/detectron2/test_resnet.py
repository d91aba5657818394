import dataclasses

import pytest
import torch
from detectron2.modeling.backbone import Backbone, BasicStem, BottleneckBlock, ResNet, make_stage
from detectron2.modeling.backbone.resnet import BasicBlock
from recorded_cases import RecordedCases, close
from torch import nn

STAGES = ["res2", "res3", "res4", "res5"]


@pytest.fixture(scope="module")
def cases(reference_dir):
    return RecordedCases(reference_dir / "detrex", "backbones")


def small_resnet(block, norm="FrozenBN", **kwargs):
    stage_kwargs = {"norm": norm}
    if "stride_in_1x1" in kwargs:
        stage_kwargs["stride_in_1x1"] = kwargs.pop("stride_in_1x1")
    stages, channels = [], 4
    plan = zip([8, 12, 16, 20], [2, 1, 2, 1], [1, 2, 2, 2], strict=True)
    for out_channels, blocks, stride in plan:
        if block is BottleneckBlock:
            stage_kwargs["bottleneck_channels"] = out_channels // 4
        stages.append(
            ResNet.make_stage(
                block,
                blocks,
                in_channels=channels,
                out_channels=out_channels,
                stride_per_block=[stride] + [1] * (blocks - 1),
                **stage_kwargs,
            )
        )
        channels = out_channels
    return ResNet(BasicStem(3, 4, norm), stages, **kwargs)


@pytest.mark.parametrize(
    ("case", "block", "kwargs"),
    [
        ("resnet_bottleneck", BottleneckBlock, {"stride_in_1x1": False}),
        ("resnet_bottleneck_stride_in_1x1", BottleneckBlock, {"stride_in_1x1": True}),
        ("resnet_basic", BasicBlock, {}),
    ],
)
def test_small_resnets_match_the_recorded_ones(cases, case, block, kwargs):
    facts = cases.facts[case]
    model = small_resnet(block, out_features=STAGES, **kwargs)
    assert list(model.state_dict()) == facts["state_dict_keys"]
    model.load_state_dict(cases.arrays(case, "param"))

    x = cases.arrays(case, "in")["x"].requires_grad_()
    outputs = model(x)
    expected = cases.arrays(case, "out")
    assert list(outputs) == list(expected)
    for name, feature in outputs.items():
        close(feature, expected[name], atol=1e-4)

    sum(feature.sum() for feature in outputs.values()).backward()
    assert x.grad.norm().item() == pytest.approx(facts["input_grad_norm"], rel=2e-3)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(facts["param_grad_norms"], rel=2e-3)

    shapes = {k: dataclasses.asdict(s) for k, s in model.output_shape().items()}
    assert shapes == facts["output_shape"]
    assert model.size_divisibility == facts["size_divisibility"]
    assert model.padding_constraints == facts["padding_constraints"]


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing_reaches_the_recorded_parts(cases, freeze_at):
    expected = cases.facts["resnet_basic"]["freeze_at"][str(freeze_at)]
    model = small_resnet(BasicBlock, norm="BN", freeze_at=freeze_at)
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    live = {n.split(".")[0] for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert sorted(frozen) == expected["frozen_parameters"]
    assert sorted(live) == expected["has_BatchNorm2d"]
    assert list(model.output_shape()) == expected["default_out_features"]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_default_stages_have_the_recorded_plan(cases, depth):
    with torch.device("meta"):
        stages = ResNet.make_default_stages(depth)
        model = ResNet(BasicStem(), stages, num_classes=1000)
    plan = [
        {
            "block": type(blocks[0]).__name__,
            "blocks": len(blocks),
            "out_channels": blocks[-1].out_channels,
            "first_stride": blocks[0].stride,
        }
        for blocks in stages
    ]
    assert plan == cases.facts["resnet_default_stages"]["stages"][str(depth)]
    assert isinstance(stages[0][0].conv1.norm, nn.BatchNorm2d)
    # Parameter counts of torchvision's networks of the same depth.
    published = {18: 11689512, 34: 21797672, 50: 25557032, 101: 44549160, 152: 60192808}
    assert sum(p.numel() for p in model.parameters()) == published[depth]


def test_initialisation_matches_the_recorded_statistics(reference_dir):
    recorded = RecordedInitialisation(reference_dir).backbone("conditional_detr_r50_50ep")
    stem = BasicStem(norm="FrozenBN")
    stage = ResNet.make_default_stages(50, norm="FrozenBN")[0]
    model = ResNet(stem, [stage], out_features=["res2"])
    weights = model.state_dict()
    assert recorded
    for name, stats in recorded.items():
        weight = weights[name]
        assert weight.std().item() == pytest.approx(stats["std"], rel=0.1), name
        assert abs(weight.mean().item()) < 5 * stats["std"] / weight.numel() ** 0.5


class RecordedInitialisation:
    def __init__(self, folder):
        import json

        text = (folder / "detrex" / "initialisation.json").read_text()
        self._models = json.loads(text)["models"]

    def backbone(self, model):
        return {
            name.removeprefix("backbone."): stats
            for name, stats in self._models[model].items()
            if name.startswith("backbone.")
        }


def test_classifier_features_and_stages_left_out():
    stages = ResNet.make_default_stages(18)
    model = ResNet(BasicStem(), stages, out_features=["stem", "res3"]).eval()
    assert not hasattr(model, "res4")
    outputs = model(torch.randn(1, 3, 33, 64))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "stem": (1, 64, 9, 16),
        "res3": (1, 128, 5, 8),
    }
    classifier = ResNet(BasicStem(), ResNet.make_default_stages(18), num_classes=7).eval()
    assert classifier(torch.randn(2, 3, 32, 32))["linear"].shape == (2, 7)
    assert issubclass(ResNet, Backbone)


def test_dilation_keeps_resolution_and_receptive_field():
    """A dilated stage computes what the strided one does, at the cells in between too."""
    kwargs = {"in_channels": 4, "out_channels": 8, "bottleneck_channels": 4, "norm": "FrozenBN"}
    strided = nn.Sequential(*make_stage(BottleneckBlock, 2, stride_per_block=[2, 1], **kwargs))
    dilated = nn.Sequential(
        *make_stage(
            BottleneckBlock, 2, stride_per_block=[1, 1], dilation_per_block=[1, 2], **kwargs
        )
    )
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 4, 9, 9)
    assert dilated(x).shape[-2:] == (9, 9)
    close(dilated(x)[..., ::2, ::2], strided(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ResNet(BasicStem(), ResNet.make_default_stages(18), out_features=["res9"]),
        lambda: ResNet(BasicStem(), [[nn.Identity()]]),
        lambda: ResNet(BasicStem(), [[]]),
        lambda: ResNet(BasicStem(), ResNet.make_default_stages(18))(torch.zeros(3, 8, 8)),
        lambda: make_stage(BasicBlock, 2, in_channels=4, out_channels=4, stride_per_block=[1]),
        lambda: make_stage(
            BasicBlock, 1, in_channels=4, out_channels=4, stride=1, stride_per_block=[1]
        ),
    ],
)
def test_wrong_arguments_are_refused(build):
    with pytest.raises(AssertionError):
        build()


def test_a_full_resnet50_has_the_recorded_keys(reference_dir):
    """Keys, shapes and what is trained, as in the published Conditional-DETR checkpoint."""
    import json

    file = reference_dir / "detrex" / "checkpoint_keys" / "conditional_detr_r50_50ep.json"
    recorded = {
        name.removeprefix("backbone."): entry
        for name, entry in json.loads(file.read_text())["keys"].items()
        if name.startswith("backbone.")
    }
    with torch.device("meta"):
        stages = ResNet.make_default_stages(50, norm="FrozenBN")
        model = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=STAGES, freeze_at=1)
    trained = {name: "p" if p.requires_grad else "f" for name, p in model.named_parameters()}
    actual = {k: [trained.get(k, "b"), list(v.shape)] for k, v in model.state_dict().items()}
    assert actual == recorded
