"""The layout of the released single-scale checkpoint."""

import pytest
import torch
from conversion_cases import ROWS
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detrex.modeling.backbone.torchvision_resnet import TorchvisionResNet
from tiny_detectors import ROOT
from tiny_smca import RecordedSMCA, build_single_scale_smca, official_name
from torch import nn

from detectors.conversion.convert import convert
from detectors.conversion.layout import ConversionError, recognise
from projects.smca.checkpoint import SMCA
from tools.convert_checkpoint import LAYOUTS, main

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


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return instantiate(LazyConfig.load(str(PATH)).model).eval()


@pytest.fixture(scope="module")
def converted(released, model):
    return convert(released, recognise(released, LAYOUTS.values()), model)


def test_keys_are_in_this_layout_alone(released):
    assert [name for name, x in LAYOUTS.items() if x.recognise(released)] == ["smca"]


def test_the_command_writes_the_same(released, converted, tmp_path):
    files = [tmp_path / "released.pth", tmp_path / "ours.pth"]
    torch.save({"model": released, "epoch": 49}, files[0])
    assert main([*map(str, files), "--config-file", str(PATH)]) == 0
    written = torch.load(files[1], weights_only=True)["model"]
    assert written.keys() == converted.keys()
    assert all(torch.equal(written[key], value) for key, value in converted.items())
    for file in files:
        file.unlink()


def test_every_key_finds_its_place(released, model, converted):
    model.load_state_dict(converted, strict=True)
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


def test_backbone_keeps_its_features(released, model, converted):
    """The renamed backbone computes what the original one does."""
    torch.manual_seed(0)
    original = TorchvisionResNet("resnet50", True, return_layers={"layer4": "res5"}).eval()
    original.load_state_dict(
        {
            key: released[f"backbone.0.body.{key.removeprefix('body.')}"]
            for key in original.state_dict()
        }
    )
    model.load_state_dict(converted)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = original(image)["res5"], model.backbone(image)["res5"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["independent", "single"])
def test_outputs_are_the_recorded_ones(reference_dir, variant):
    record = RecordedSMCA(reference_dir / "smca", "decoder")
    model = build_single_scale_smca(record.settings, scales=variant)
    weights = {f"input_proj.{key}": value for key, value in model.input_proj.state_dict().items()}
    for key, value in record.under("state").items():
        if "scale_predictor" not in key or f"scale_predictor_{variant}." in key:
            weights[official_name(key.replace(f"scale_predictor_{variant}", "point3"))] = value
    assert recognise(weights, LAYOUTS.values()) is SMCA
    state = convert(weights, SMCA, model)
    model.load_state_dict(state, strict=True)
    model.double().eval()
    with torch.no_grad():
        memory = model.encode(record.features(torch.float64))
        predictions = model.predict(model.decode(memory, model.queries(memory)))
    for found, key in ((predictions.logits, "class_logits"), (predictions.boxes, "boxes")):
        expected = record.tensor(f"out_{variant}/{key}").double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_logits_of_sparse_ids_become_contiguous(released, converted):
    contiguous = MetadataCatalog.get("coco_2017_train").thing_dataset_id_to_contiguous_id
    assert converted["class_embed.weight"].shape == (80, DIM)
    for number, index in contiguous.items():
        for key in ("class_embed.weight", "class_embed.bias"):
            assert torch.equal(converted[key][index], released[key][number])


@pytest.mark.parametrize(("rows", "classes"), [(92, 91), (91, 91), (91, 80), (80, 80), (7, 7)])
def test_heads_of_other_sizes(released, model, monkeypatch, rows: int, classes: int):
    head = {"weight": torch.randn(rows, DIM), "bias": torch.arange(float(rows))}
    weights = released | {f"class_embed.{kind}": value for kind, value in head.items()}
    monkeypatch.setitem(model._modules, "class_embed", nn.Linear(DIM, classes))
    bias = convert(weights, SMCA, model)["class_embed.bias"].tolist()
    assert bias == (ROWS if (rows, classes) == (91, 80) else [*range(classes)])


@pytest.mark.parametrize(
    "key",
    [
        "transformer.decoder.layers.2.point4.weight",
        "transformer.encoder.layers.0.self_attn_1.weight",
        "transformer.encoder.layers.0.norm3.weight",
        "transformer.decoder.layers.1.point1.layers.0.weight",
        "level_embed",
    ],
)
def test_a_key_that_is_not_understood_is_listed(released, model, key):
    with pytest.raises(ConversionError, match=rf"^1 keys are not understood as smca: {key}$"):
        convert({**released, key: torch.ones(1)}, SMCA, model)
