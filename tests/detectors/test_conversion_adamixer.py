"""Weights in the layout of AdaMixer's release."""

import pytest
import torch
from conversion_cases import CHANNELS, read_facts, recipe, tiny_config
from detectron2.config import instantiate

from detectors.conversion.convert import convert
from detectors.conversion.layout import ConversionError, recognise
from tools.convert_checkpoint import LAYOUTS

# a stage's modules: theirs, ours, and the shape of the weight where it is no norm's
STAGE = {
    "attention_norm": ("attention_norm", [32]),
    "ffn.layers.0.0": ("ffn.layers.0.0", [96, 32]),
    "ffn.layers.1": ("ffn.layers.1", [32, 96]),
    "ffn_norm": ("ffn_norm", [32]),
    "attention.attn.out_proj": ("attention.attn.out_proj", [32, 32]),
    "sampling_n_mixing.norm": ("mixing_norm", [32]),
    "sampling_n_mixing.sampling_offset_generator.0": ("sampling_offsets", [24, 32]),
    "sampling_n_mixing.adaptive_mixing.parameter_generator.0": (
        "mixing.parameter_generator",
        [2 * (16 * 16 + 4 * 8), 32],
    ),
    "sampling_n_mixing.adaptive_mixing.out_proj": ("mixing.out_proj", [32, 2 * 8 * 16]),
}
HEADS = {
    "cls_fcs.0": ("class_embed", 0, [32, 32]),
    "cls_fcs.1": ("class_embed", 1, [32]),
    "fc_cls": ("class_embed", 3, [80, 32]),
    "reg_fcs.0": ("bbox_embed", 0, [32, 32]),
    "reg_fcs.1": ("bbox_embed", 1, [32]),
    "fc_reg": ("bbox_embed", 3, [4, 32]),
}


def tiny_adamixer():
    """A config of two stages with 32 channels; the backbone's norms learn their weights."""
    config = tiny_config("adamixer_r50_1x_100query", norm="BN")
    config.embed_dim = config.neck.out_channels = 32
    config.neck.num_groups = 8
    config.neck.in_channels = list(CHANNELS.values())
    config.transformer.encoder.embed_dim = 32
    config.transformer.decoder.update(
        embed_dim=32, num_heads=4, num_groups=2, in_points=4, out_points=8
    )
    return instantiate(config)


def pairs():
    """Their keys, each with ours and its shape; the backbone's aside."""
    found = {"rpn_head.init_content_features.weight": ("query_embed.weight", [7, 32])}
    for kind in ("weight", "bias"):
        found[f"neck.gn_out.{kind}"] = (f"neck.norm.{kind}", [32])
        for level, channels in enumerate(CHANNELS.values()):
            shape = [32, channels, 1, 1] if kind == "weight" else [32]
            found[f"neck.lateral_convs.{level}.conv.{kind}"] = (
                f"neck.lateral_convs.{level}.{kind}",
                shape,
            )
    for stage in range(2):
        theirs, ours = f"roi_head.bbox_head.{stage}", f"transformer.decoder.layers.{stage}"
        found[f"{theirs}.iof_tau"] = (f"{ours}.attention.iof_tau", [4])
        for kind, shape in {"weight": [96, 32], "bias": [96]}.items():
            name = f"attention.attn.in_proj_{kind}"
            found[f"{theirs}.{name}"] = (f"{ours}.{name}", shape)
        modules = {old: (f"{ours}.{new}", shape) for old, (new, shape) in STAGE.items()}
        modules |= {old: (f"{h}.{stage}.{i}", shape) for old, (h, i, shape) in HEADS.items()}
        for old, (new, shape) in modules.items():
            found[f"{theirs}.{old}.weight"] = (f"{new}.weight", shape)
            found[f"{theirs}.{old}.bias"] = (f"{new}.bias", shape[:1])
    return found


def their_backbone():
    """A ResNet's shapes by torchvision's names, as the other official models have it."""
    prefix = "backbone.0.body."
    shapes = {
        key.replace(prefix, "backbone."): shape
        for key, shape in read_facts("official")["detr"]["shapes"].items()
        if key.startswith(prefix)
    }
    counters = {key.rpartition(".")[0] for key in shapes if key.endswith("running_var")}
    return shapes, {f"{norm}.num_batches_tracked": torch.tensor(5) for norm in counters}


def test_every_weight_finds_its_place() -> None:
    table = pairs()
    backbone, counters = their_backbone()
    weights = recipe({old: shape for old, (_, shape) in table.items()} | backbone) | counters
    weights["rpn_head.init_proposal_bboxes.weight"] = torch.rand(7, 4)
    layout = recognise(weights, LAYOUTS.values())
    assert layout.name == "adamixer"
    model = tiny_adamixer()
    state = convert(weights, layout, model)
    for old, (new, _) in table.items():
        assert torch.equal(state[new], weights[old]), old
    expected = weights["backbone.layer4.0.downsample.1.running_mean"]
    assert torch.equal(state["backbone.res5.0.shortcut.norm.running_mean"], expected)
    assert state["backbone.stem.conv1.norm.num_batches_tracked"] == 5
    model.load_state_dict(state, strict=True)
    ours = {key for key in state if not key.startswith("backbone.")}
    assert ours == {new for new, _ in table.values()}


def test_models_with_masks_are_not_understood() -> None:
    backbone, _ = their_backbone()
    weights = recipe(backbone) | {"roi_head.mask_head.0.conv.weight": torch.zeros(1)}
    with pytest.raises(ConversionError, match=r"as adamixer: roi_head\.mask_head\.0\.conv\.weight"):
        convert(weights, LAYOUTS["adamixer"], tiny_adamixer())
