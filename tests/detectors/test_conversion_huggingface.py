"""Weights that transformers' models save: same outputs as theirs, padding included."""

import pytest
import torch
from conversion_cases import CHANNELS, ROWS, batch, build, predict, recipe, tiny_config
from detectron2.config import instantiate

from detectors.conversion.convert import convert
from detectors.conversion.files import read_weights
from detectors.conversion.layout import recognise
from tools.convert_checkpoint import LAYOUTS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

ONE_LEVEL, THREE_LEVELS = ["stage4"], ["stage2", "stage3", "stage4"]
CASES = {
    "detr_r50_300ep": ("hf-detr", "Detr", ONE_LEVEL, {"d_model": 256}),
    "conditional_detr_r50_50ep": (
        "hf-conditional-detr",
        "ConditionalDetr",
        ONE_LEVEL,
        {"d_model": 256},
    ),
    "dab_detr_r50_50ep": ("hf-dab-detr", "DabDetr", ONE_LEVEL, {"hidden_size": 256}),
    "deformable_detr_r50_50ep": (
        "hf-deformable-detr",
        "DeformableDetr",
        THREE_LEVELS,
        {"d_model": 256},
    ),
    "deformable_detr_r50_single_scale_50ep": (
        "hf-deformable-detr",
        "DeformableDetr",
        ONE_LEVEL,
        {"d_model": 256, "num_feature_levels": 1},
    ),
    "deformable_detr_r50_with_box_refinement_50ep": (
        "hf-deformable-detr",
        "DeformableDetr",
        THREE_LEVELS,
        {"d_model": 256, "with_box_refine": True},
    ),
    "deformable_detr_r50_two_stage_50ep": (
        "hf-deformable-detr",
        "DeformableDetr",
        THREE_LEVELS,
        {
            "d_model": 256,
            "with_box_refine": True,
            "two_stage": True,
            "two_stage_num_proposals": 7,
        },
    ),
}


def their_model(kind: str, stages: list[str], options: dict) -> torch.nn.Module:
    """A tiny model with the recipe's weights, its ResNet from transformers itself."""
    resnet = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=list(CHANNELS.values()),
        depths=[1] * 4,
        layer_type="bottleneck",
        out_features=stages,
    )
    config = getattr(transformers, f"{kind}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=resnet,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=7,
        num_labels=91,
        **options,
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    state, first = model.state_dict(keep_vars=True), {}
    for key, value in state.items():
        first.setdefault(id(value), key)
    own = {key: list(v.shape) for key, v in state.items() if first[id(v)] == key}
    aliases = {key: first[id(v)] for key, v in state.items() if first[id(v)] != key}
    model.load_state_dict(recipe(own, aliases))
    return model


def their_predictions(model: torch.nn.Module, items: list[dict]):
    """Logits and boxes of the last layer on normalised images, padded to the first one's size."""
    height, width = items[0]["image"].shape[1:]
    pixels = torch.zeros(len(items), 3, height, width)
    mask = torch.zeros(len(items), height, width, dtype=torch.long)
    for row, item in enumerate(items):
        h, w = item["image"].shape[1:]
        pixels[row, :, :h, :w] = (item["image"] / 255 - MEAN) / STD
        mask[row, :h, :w] = 1
    with torch.no_grad():
        output = model(pixel_values=pixels, pixel_mask=mask)
    return output.logits, output.pred_boxes


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(name: str, tmp_path) -> None:
    layout_name, kind, stages, options = CASES[name]
    theirs = their_model(kind, stages, options)
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path / "model.safetensors")
    layout = recognise(weights, LAYOUTS.values())
    assert layout.name == layout_name
    config = tiny_config(name)
    ours = build(config, convert(weights, layout, instantiate(config)))
    ours.separate_at_inference = False  # as theirs

    items = batch()
    logits, boxes = predict(ours, items)
    expected, expected_boxes = their_predictions(theirs, items)
    rows = [*ROWS, 91] if expected.shape[-1] == 92 else ROWS
    torch.testing.assert_close(logits[-1], expected[..., rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes[-1], expected_boxes, rtol=0, atol=2e-5)


TIMM = {
    "embedder.embedder.convolution": "conv1",
    "embedder.embedder.normalization": "bn1",
    "shortcut.convolution": "downsample.0",
    "shortcut.normalization": "downsample.1",
    **{f"layer.{index}.convolution": f"conv{index + 1}" for index in range(3)},
    **{f"layer.{index}.normalization": f"bn{index + 1}" for index in range(3)},
    **{f"encoder.stages.{index}.layers": f"layer{index + 1}" for index in range(4)},
}


def test_timm_names_of_the_backbone_mean_the_same(tmp_path) -> None:
    theirs = their_model("Detr", ONE_LEVEL, {"d_model": 256})
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path / "model.safetensors")
    renamed = {}
    for key, value in weights.items():
        if "conv_encoder" in key:
            for old, new in TIMM.items():
                key = key.replace(f"{old}.", f"{new}.")
        renamed[key] = value
    assert "model.backbone.conv_encoder.model.layer3.0.downsample.1.running_var" in renamed
    model = instantiate(tiny_config("detr_r50_300ep"))
    expected, found = (convert(state, LAYOUTS["hf-detr"], model) for state in (weights, renamed))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
