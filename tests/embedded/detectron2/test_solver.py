"""Parameter groups and learning-rate curves against recorded numbers."""

import json

import pytest
import torch
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from torch import nn


@pytest.fixture(scope="module")
def runtime(reference_dir):
    return json.loads((reference_dir / "detrex" / "runtime.json").read_text())


def steps(values, milestones, warmup_iters=0.0, **kwargs):
    """A multi-step schedule behind a linear warm-up from 0.001."""
    scheduler = MultiStepParamScheduler(values=values, milestones=milestones, **kwargs)
    return WarmupParamScheduler(scheduler, 0.001, warmup_iters / milestones[-1], "linear")


CURVES = {
    "lr_multiplier_12ep": lambda: steps([1, 0.1], [82500, 90000]),
    "lr_multiplier_50ep": lambda: steps([1, 0.1], [300000, 375000]),
    "lr_multiplier_12ep_warmup": lambda: steps([1, 0.1], [82500, 90000], 7.5),
    "lr_multiplier_50ep_warmup": lambda: steps([1, 0.1], [300000, 375000], 7.5),
    "lr_multiplier_1x": lambda: steps([1, 0.1, 0.01], [60000, 80000, 90000], 1000),
    "lr_multiplier_2x": lambda: steps([1, 0.1, 0.01], [120000, 160000, 180000], 1000),
    "lr_multiplier_3x": lambda: steps([1, 0.1, 0.01], [210000, 250000, 270000], 1000),
    "lr_multiplier_12ep_with_max_iter_1000": lambda: steps([1, 0.1], [82500, 90000]),
    "detr_300ep": lambda: steps([1, 0.1], [369600, 554400]),
    "multistep_num_updates": lambda: MultiStepParamScheduler(
        [1, 0.5, 0.25], milestones=[4, 8], num_updates=10
    ),
    "warmup_cosine_linear": lambda: WarmupParamScheduler(
        CosineParamScheduler(1.0, 0.0), 0.01, 0.1, "linear"
    ),
    "warmup_cosine_constant": lambda: WarmupParamScheduler(
        CosineParamScheduler(1.0, 0.0), 0.25, 0.2, "constant"
    ),
    "warmup_cosine_linear_rescaled": lambda: WarmupParamScheduler(
        CosineParamScheduler(1.0, 0.0), 0.01, 0.1, "linear", rescale_interval=True
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_recorded_curve(runtime, name):
    recorded = runtime["schedules"][name]
    scheduler, max_iter = CURVES[name](), recorded["max_iter"]
    for iteration, expected in recorded["multiplier_at_iteration"].items():
        found = scheduler(int(iteration) / max_iter)
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12), iteration


def test_lr_multiplier_drives_every_group(runtime):
    recorded = runtime["schedules"]["lr_multiplier_sequence"]
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.01, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = MultiStepParamScheduler([1, 0.1, 0.01], milestones=[5, 8], num_updates=10)
    scheduler = LRMultiplier(optimizer, WarmupParamScheduler(schedule, 0.5, 0.2), max_iter=10)
    lrs = []
    for iteration in range(11):
        lrs.append([group["lr"] for group in optimizer.param_groups])
        if iteration < 10:
            optimizer.step()
            scheduler.step()
    assert lrs == [pytest.approx(pair, rel=1e-12) for pair in recorded["lrs"]]
    assert scheduler.state_dict() == recorded["state_dict"]


def test_lr_multiplier_resumes_where_it_stopped():
    def build():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, LRMultiplier(optimizer, CosineParamScheduler(1.0, 0.0), max_iter=10)

    optimizer, scheduler = build()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    resumed_optimizer, resumed = build()
    resumed.load_state_dict(scheduler.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        for opt, sched in ((optimizer, scheduler), (resumed_optimizer, resumed)):
            opt.step()
            sched.step()
        assert resumed_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_scheduler_errors():
    with pytest.raises(ValueError, match="exponential"):
        WarmupParamScheduler(CosineParamScheduler(1, 0), 0.1, 0.1, "exponential")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="ParamScheduler"):
        LRMultiplier(optimizer, 0.5, max_iter=10)


def recorded_model() -> nn.Module:
    """The module that the recording describes."""
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.conv = nn.Conv2d(2, 3, 1)
    model.backbone.bn = nn.BatchNorm2d(3)
    model.backbone.frozen = nn.Linear(2, 2).requires_grad_(False)
    model.enc = nn.Module()
    model.enc.norm = nn.LayerNorm(4)
    model.enc.attn = nn.MultiheadAttention(4, 2)
    model.enc.gn = nn.GroupNorm(2, 4)
    model.enc.act = nn.PReLU()
    model.embed = nn.Embedding(5, 4)
    model.head = nn.Linear(4, 5)
    model.head.weight = model.embed.weight
    model.level = nn.Parameter(torch.zeros(3))
    return model


GROUPS = {
    "no_arguments": {},
    "weight_decay_norm": {"weight_decay_norm": 0.0},
    "detr_style": {
        "base_lr": 1e-4,
        "weight_decay_norm": 0.0,
        "lr_factor_func": lambda name: 0.1 if "backbone" in name else 1,
    },
    "weight_decay_and_bias": {
        "base_lr": 1e-4,
        "weight_decay": 1e-4,
        "weight_decay_norm": 0.0,
        "bias_lr_factor": 2.0,
        "weight_decay_bias": 0.0,
    },
    "overrides": {
        "base_lr": 1e-4,
        "overrides": {
            "level": {"lr": 0.5, "weight_decay": 0.25},
            "weight": {"weight_decay": 0.125},
        },
    },
}


@pytest.mark.parametrize("name", GROUPS)
def test_recorded_groups(runtime, name):
    model = recorded_model()
    names = {parameter: key for key, parameter in model.named_parameters()}
    found = get_default_optimizer_params(model, **GROUPS[name])
    expected = runtime["get_default_optimizer_params"][name]
    assert len(found) == len(expected)
    for group, recorded in zip(found, expected, strict=True):
        assert [names[parameter] for parameter in group["params"]] == recorded["params"]
        rest = {key: value for key, value in group.items() if key != "params"}
        assert rest == pytest.approx({k: v for k, v in recorded.items() if k != "params"})


def test_names_given_to_lr_factor_func(runtime):
    names = []
    get_default_optimizer_params(
        recorded_model(), base_lr=1.0, lr_factor_func=lambda name: names.append(name) or 1.0
    )
    assert names == runtime["get_default_optimizer_params"]["names_given_to_lr_factor_func"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"bias_lr_factor": 2.0},
        {"lr_factor_func": lambda name: 1.0},
        {"weight_decay_bias": 0.0, "overrides": {"bias": {"lr": 1.0}}},
    ],
)
def test_contradictory_arguments(arguments):
    with pytest.raises(ValueError, match=r"base_lr|bias"):
        get_default_optimizer_params(recorded_model(), **arguments)


def test_overrides_are_not_changed():
    overrides = {"weight": {"lr": 1.0}}
    get_default_optimizer_params(recorded_model(), weight_decay_bias=0.0, overrides=overrides)
    if "bias" in overrides:
        pytest.skip("the installed detectron2 adds its own entry")
    assert overrides == {"weight": {"lr": 1.0}}


def test_reduce_param_groups_merges_and_lets_the_last_win():
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = reduce_param_groups(
        [
            {"params": [a, b], "lr": 1.0},
            {"params": [c], "lr": 2.0},
            {"params": [b], "lr": 2.0},
        ]
    )
    assert [(group["lr"], len(group["params"])) for group in groups] == [(1.0, 1), (2.0, 2)]
    assert groups[0]["params"][0] is a
    assert [p is q for p, q in zip(groups[1]["params"], (b, c), strict=True)] == [True, True]
    named = reduce_param_groups([{"params": [a, b], "param_names": ["a", "b"], "lr": 1.0}])
    assert named[0]["param_names"] == ["a", "b"]
