"""Weights in the layouts of official releases: same outputs as the authors' code."""

import numpy as np
import pytest
import torch
from conversion_cases import FACTS, ROWS, batch, build, predict, read_facts, recipe, tiny_config
from detectron2.config import LazyConfig, instantiate
from tiny_detectors import ROOT

from detectors.conversion.convert import convert
from detectors.conversion.layout import recognise
from tools.convert_checkpoint import LAYOUTS

OFFICIAL = read_facts("official")


def converted(facts, config):
    weights = recipe(facts["shapes"], facts["aliases"])
    layout = recognise(weights, LAYOUTS.values())
    assert layout.name == facts["layout"]
    return convert(weights, layout, instantiate(config))


@pytest.mark.parametrize("case", OFFICIAL)
def test_outputs_are_those_of_the_authors_code(case: str) -> None:
    facts, arrays = OFFICIAL[case], np.load(FACTS / "official.npz")
    config = tiny_config(facts["config"])
    if "transformer.patterns.weight" in facts["shapes"]:
        config.transformer.num_patterns = facts["shapes"]["transformer.patterns.weight"][0]
    model = build(config, converted(facts, config))
    model.separate_at_inference = False  # as in their code
    logits, boxes = predict(model, batch(facts["images"]))
    expected = torch.from_numpy(arrays[f"{case}/logits"])
    rows = [*ROWS, 91] if expected.shape[-1] == 92 else ROWS
    torch.testing.assert_close(logits, expected[..., rows], rtol=1e-4, atol=1e-4)
    recorded = torch.from_numpy(arrays[f"{case}/boxes"])
    torch.testing.assert_close(boxes, recorded, rtol=0, atol=2e-5)


def test_a_head_of_all_category_ids_is_kept_by_a_model_that_has_as_many() -> None:
    facts = OFFICIAL["conditional_detr"]
    config = tiny_config(facts["config"], classes=91)
    state = converted(facts, config)
    weights = recipe({"class_embed.weight": [91, 256]})
    assert torch.equal(state["class_embed.weight"], weights["class_embed.weight"])


def test_the_head_for_proposals_keeps_the_row_that_finds_objects() -> None:
    facts = OFFICIAL["deformable_detr_two_stage"]
    state = converted(facts, tiny_config(facts["config"]))
    weights = recipe({f"transformer.decoder.class_embed.{head}.bias": [91] for head in (1, 2)})
    of_decoder, of_encoder = weights.values()
    assert torch.equal(state["class_embed.1.bias"], of_decoder[ROWS])
    assert torch.equal(state["class_embed.2.bias"], of_encoder[:80])
    assert torch.equal(state["transformer.decoder.class_embed.2.bias"], of_encoder[:80])


def test_deformable_detr_on_one_level_is_understood() -> None:
    """Its numbers are compared with those of transformers' model."""
    facts = OFFICIAL["deformable_detr"]
    shapes = {key: shape for key, shape in facts["shapes"].items() if "input_proj" not in key}
    for key, shape in shapes.items():
        if "sampling_offsets" in key or "attention_weights" in key:
            shapes[key] = [shape[0] // 4, *shape[1:]]
    shapes |= {"transformer.level_embed": [1, 256], "input_proj.0.0.weight": [256, 128, 1, 1]}
    shapes |= {f"input_proj.0.{name}": [256] for name in ("0.bias", "1.weight", "1.bias")}
    config = tiny_config("deformable_detr_r50_single_scale_50ep")
    state = converted({**facts, "shapes": shapes}, config)
    build(config, state)
    expected = recipe({"input_proj.0.0.weight": shapes["input_proj.0.0.weight"]})
    assert torch.equal(state["neck.convs.0.conv.weight"], *expected.values())


def test_dilated_resnets_keep_torchvision_names() -> None:
    model = instantiate(
        LazyConfig.load(str(ROOT / "projects/baselines/configs/detr_r50_dc5_300ep.py")).model
    )
    shapes = read_facts("full_size")["detr"]
    weights = {key: torch.full(shape, 0.5) for key, shape in shapes.items()}
    weights["backbone.0.body.layer4.1.bn2.weight"].fill_(7)
    state = convert(weights, LAYOUTS["detr"], model)
    assert state["backbone.body.layer4.1.bn2.weight"].unique().tolist() == [7]
    assert state.keys() == model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("case", read_facts("full_size"))
def test_released_sizes_fit_our_configs(case: str) -> None:
    shapes = read_facts("full_size")[case]
    config = f"projects/baselines/configs/{OFFICIAL[case]['config']}.py"
    model = instantiate(LazyConfig.load(str(ROOT / config)).model)
    weights = {key: torch.zeros(shape) for key, shape in shapes.items()}
    state = convert(weights, recognise(weights, LAYOUTS.values()), model)
    assert state.keys() == model.state_dict().keys()
