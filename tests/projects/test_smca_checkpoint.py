"""The converter of the released single-scale checkpoint's layout."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detrex.modeling.backbone.torchvision_resnet import TorchvisionResNet
from tiny_detectors import ROOT

from projects.smca.checkpoint import from_released

PATH = ROOT / "projects/smca/configs/smca_single_scale_r50_50ep.py"
DIM, WIDTH, HEADS = 256, 2048, 8
ATTENTION = {
    "in_proj_weight": (3 * DIM, DIM),
    "in_proj_bias": (3 * DIM,),
    "out_proj.weight": (DIM, DIM),
    "out_proj.bias": (DIM,),
}


def linear(rows, columns=DIM):
    return {"weight": (rows, columns), "bias": (rows,)}


NORM = {"weight": (DIM,), "bias": (DIM,)}
FEED_FORWARD = {"linear1": linear(WIDTH), "linear2": linear(DIM, WIDTH)}
ENCODER = {"self_attn": ATTENTION, **FEED_FORWARD, "norm1": NORM, "norm2": NORM}
DECODER = {
    **ENCODER,
    "multihead_attn": ATTENTION,
    "norm3": NORM,
    "norm4": NORM,
    "point2": linear(2 * HEADS),
    "point3": linear(2 * HEADS),
}


def released_shapes():
    """Keys and shapes of the released checkpoint, from what its modules are."""
    modules = {"input_proj": {"weight": (DIM, 2048, 1, 1), "bias": (DIM,)}}
    for index in range(6):
        for stack, parts in (("encoder", ENCODER), ("decoder", DECODER)):
            layer = f"transformer.{stack}.layers.{index}"
            modules |= {f"{layer}.{part}": shapes for part, shapes in parts.items()}
    for index, rows in enumerate((DIM, DIM, 2)):
        modules[f"transformer.decoder.layers.0.point1.layers.{index}"] = linear(rows)
    for index, rows in enumerate((DIM, DIM, 4)):
        modules[f"bbox_embed.layers.{index}"] = linear(rows)
    modules["transformer.decoder.norm"] = NORM
    modules["class_embed"] = linear(92)
    modules["query_embed"] = {"weight": (300, DIM)}
    return {f"{name}.{key}": shape for name, keys in modules.items() for key, shape in keys.items()}


@pytest.fixture(scope="module")
def released():
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(*shape, generator=generator) for key, shape in released_shapes().items()
    }
    body = TorchvisionResNet("resnet50", True, return_layers={"layer4": "res5"}).state_dict()
    for key, value in body.items():
        name = key.removeprefix("body.")
        state[f"backbone.0.body.{name}"] = value
    return state


def test_every_key_finds_its_place(released):
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(PATH)).model)
    model.load_state_dict(from_released(released), strict=True)
    decoder = model.transformer.decoder
    layer = decoder.layers[3]
    pairs = [
        (layer.attentions[1].attn.out_proj.weight, "layers.3.multihead_attn.out_proj.weight"),
        (layer.ffns[0].layers[0][0].weight, "layers.3.linear1.weight"),
        (layer.ffns[0].layers[1].weight, "layers.3.linear2.weight"),
        (layer.norms[2].weight, "layers.3.norm3.weight"),
        (layer.modulation.norm.weight, "layers.3.norm4.weight"),
        (layer.modulation.offsets.weight, "layers.3.point2.weight"),
        (layer.modulation.scales.bias, "layers.3.point3.bias"),
        (decoder.center_head.layers[1].weight, "layers.0.point1.layers.1.weight"),
        (decoder.post_norm_layer.bias, "norm.bias"),
    ]
    for found, key in pairs:
        assert torch.equal(found, released[f"transformer.decoder.{key}"]), key


def test_backbone_keeps_its_features(released):
    """The renamed backbone computes what the original one does."""
    torch.manual_seed(0)
    original = TorchvisionResNet("resnet50", True, return_layers={"layer4": "res5"}).eval()
    original.load_state_dict(
        {
            key: released[f"backbone.0.body.{key.removeprefix('body.')}"]
            for key in original.state_dict()
        }
    )
    model = instantiate(LazyConfig.load(str(PATH)).model).eval()
    model.load_state_dict(from_released(released))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = original(image)["res5"], model.backbone(image)["res5"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_logits_of_sparse_ids_become_contiguous(released):
    converted = from_released(released)
    contiguous = MetadataCatalog.get("coco_2017_train").thing_dataset_id_to_contiguous_id
    assert converted["class_embed.weight"].shape == (80, DIM)
    for number, index in contiguous.items():
        for key in ("class_embed.weight", "class_embed.bias"):
            assert torch.equal(converted[key][index], released[key][number])
    own = {"class_embed.weight": torch.rand(7, DIM)}
    assert from_released(own)["class_embed.weight"] is own["class_embed.weight"]


@pytest.mark.parametrize(
    "key",
    [
        "transformer.decoder.layers.2.point4.weight",
        "transformer.encoder.layers.0.self_attn_1.weight",
        "transformer.encoder.layers.0.norm3.weight",
        "transformer.decoder.layers.1.point1.layers.0.weight",
        "input_proj.0.weight",
        "level_embed",
    ],
)
def test_a_key_that_is_not_understood_is_listed(key):
    state = {"query_embed.weight": torch.ones(1), key: torch.ones(1)}
    with pytest.raises(ValueError, match=rf"^not of the released single-scale SMCA: {key}$"):
        from_released(state)
