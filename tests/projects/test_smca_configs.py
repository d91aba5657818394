"""SMCA's configs: the papers' rows, parameters, multiply-adds, initialisation, settings."""

import json

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from tiny_detectors import ROOT, instances, pattern_image

from tools.analyze_model import count_multiply_adds, parameters

FOLDER = ROOT / "projects/smca/configs"
SINGLE, MULTI = "smca_single_scale_r50_50ep", "smca_r50_50ep"
HEAD_SHARED = 41_491_822, None
WHOLE = 39_529_908, 39.5
# trained parameters with 92 class logits, of which 80 are needed, and what the paper says, in
# millions. The single scale's 41.0 cannot be reached: DETR itself has 41.3 with 100 queries, and
# the paper's figure is DETR's rounded one.
PARAMETERS = {
    SINGLE: (41_538_082, None),
    "smca_single_scale_r50_108ep": (41_538_082, None),
    f"{SINGLE}_fixed": (41_513_410, None),
    f"{SINGLE}_single": (41_525_746, None),
    f"{SINGLE}_head_shared_bs8": HEAD_SHARED,
    f"{SINGLE}_head_shared_bs16": HEAD_SHARED,
    f"{SINGLE}_head_shared_bs32": HEAD_SHARED,
    MULTI: WHOLE,
    "smca_r50_108ep": WHOLE,
    f"{MULTI}_without_selection": (39_525_282, 39.5),
    f"{MULTI}_3intra": (37_950_388, 37.9),
    f"{MULTI}_3multi": (37_950_388, 37.9),
    f"{MULTI}_5intra": (39_529_908, 39.5),
    f"{MULTI}_shared_ffn": (42_161_588, 42.2),
    f"{MULTI}_shared_attention": (44_785_588, 44.7),
    f"{MULTI}_no_share": (47_417_268, 47.3),
    "smca_r101_50ep": (58_469_812, None),  # 58 in the paper
}
BASELINE = ROOT / "projects/baselines/configs/detr_r50_50ep.py"


def load(name):
    path = BASELINE if name == BASELINE.stem else FOLDER / f"{name}.py"
    return LazyConfig.load(str(path))


def test_every_config_is_a_row():
    found = {path.stem for path in FOLDER.glob("*.py") if "quickstart" not in path.stem}
    assert found == PARAMETERS.keys()


@pytest.mark.parametrize("name", [BASELINE.stem, *PARAMETERS])
def test_parameters(name):
    expected, paper = (PARAMETERS | {BASELINE.stem: (41_353_568, None)})[name]
    with torch.device("meta"):
        model = instantiate(load(name).model)
    _, trained = parameters(model.parameters())
    assert trained == expected - 12 * (256 + 1)
    if paper is not None:
        assert trained / 1e6 == pytest.approx(paper, abs=0.15)


def test_parameters_are_the_recorded_ones(reference_dir):
    record = json.loads((reference_dir / "smca/params_flops.json").read_text())
    recorded = {row["trainable_params"] for row in record["params"]["rows"]}
    assert {count for count, _ in PARAMETERS.values()} <= recorded


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SINGLE, 84.0),
        pytest.param(MULTI, 134.1, marks=pytest.mark.slow),
        pytest.param("smca_r101_50ep", 197.6, marks=pytest.mark.slow),
    ],
)
def test_multiply_adds(name, expected):
    flops = count_multiply_adds(instantiate(load(name).model).eval(), (800, 1066))
    assert flops.total() / 1e9 == pytest.approx(expected, rel=0.01)
    assert not [name for name in flops.unsupported_ops() if "attention" in name]


@pytest.mark.parametrize("name", [SINGLE, MULTI])
def test_initialisation(name):
    torch.manual_seed(0)
    state = instantiate(load(name).model).state_dict()
    for index in range(6):
        layer = f"transformer.decoder.layers.{index}.modulation."
        assert (state[layer + "scales.weight"] == 0).all()
        assert (state[layer + "scales.bias"] == 1).all()
        rows = len(state[layer + "offsets.weight"])
        check_uniform(state[layer + "offsets.weight"], (6 / (rows + 256)) ** 0.5)
        check_uniform(state[layer + "offsets.bias"], 1 / 16)
    first, second = (
        state[f"transformer.decoder.layers.{i}.modulation.offsets.bias"] for i in (0, 1)
    )
    assert not torch.equal(first, second)
    for index, rows in enumerate((256, 256, 2)):
        center = state[f"transformer.decoder.center_head.layers.{index}.weight"]
        check_uniform(center, (6 / (rows + 256)) ** 0.5)
    check_uniform(state["bbox_embed.layers.2.weight"], 1 / 16)
    assert (state["class_embed.bias"] + 4.59512).abs().max() < 1e-5
    assert state["query_embed.weight"].std().item() == pytest.approx(1, abs=0.02)
    if name == MULTI:
        assert state["level_embeds"].std().item() == pytest.approx(1, abs=0.1)
        check_uniform(state["neck.extra_convs.0.conv.weight"], (9 * 2048) ** -0.5)
    else:
        check_uniform(state["input_proj.weight"], 2048**-0.5)


def check_uniform(values, bound):
    """Values are spread over [-bound, bound]."""
    assert values.abs().max() <= bound
    error = bound / 3**0.5 / values.numel() ** 0.5
    assert abs(values.mean().item()) < 6 * error
    assert values.std(correction=0).item() == pytest.approx(bound / 3**0.5, abs=6 * error)


SCHEDULES = {
    SINGLE: (16, 50, 40),
    "smca_single_scale_r50_108ep": (16, 108, 80),
    f"{SINGLE}_head_shared_bs8": (8, 50, 40),
    f"{SINGLE}_head_shared_bs32": (32, 50, 40),
    MULTI: (8, 50, 40),
    "smca_r50_108ep": (8, 108, 80),
    "smca_r101_50ep": (8, 50, 40),
    f"{MULTI}_3multi": (8, 50, 40),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_settings(name):
    batch, epochs, drop = SCHEDULES[name]
    config = load(name)
    assert config.dataloader.train.total_batch_size == batch
    assert config.train.max_iter * batch == epochs * 120_000
    schedule = instantiate(config.lr_multiplier)
    progress = [(drop - 1) / epochs, (drop + 1) / epochs]
    assert [schedule(where) for where in progress] == pytest.approx([1.0, 0.1])
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.params.weight_decay_norm) == (
        1e-4,
        1e-4,
        None,
    )
    assert config.train.clip_grad.params == {"max_norm": 0.1, "norm_type": 2}
    model = config.model
    assert (model.num_queries, model.backbone.freeze_at) == (300, 2)
    assert model.criterion.loss_class_type == "focal_loss"
    assert config.train.output_dir == f"./output/{name}"
    depth = 101 if "r101" in name else 50
    assert config.train.init_checkpoint.endswith(f"R-{depth}.pkl")
    assert model.backbone.stages.depth == depth


@pytest.mark.parametrize("name", ["smca_single_scale_quickstart", "smca_quickstart"])
def test_quickstart_configs_are_small_and_learn(name):
    """Trained in the tests' way for a moment, the loss goes down."""
    torch.manual_seed(0)
    config = load(name)
    assert config.train.max_iter == load_quickstart_baseline().train.max_iter
    model = instantiate(config.model).train()
    assert parameters(model.parameters())[0] < 3e6
    inputs = two_shapes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    totals = []
    for _ in range(12):
        total = sum(model(inputs).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]


def load_quickstart_baseline():
    path = ROOT / "projects/baselines/configs/conditional_detr_quickstart.py"
    return LazyConfig.load(str(path))


def two_shapes():
    """Two images with one object each."""
    items = []
    for index, box in enumerate([[10.0, 20.0, 50.0, 70.0], [40.0, 8.0, 90.0, 60.0]]):
        items.append({"image": pattern_image(index, 96, 96)})
        items[-1]["instances"] = instances((96, 96), [box], [index])
    return items
