import math

import pytest
import torch
from detrex.layers import (
    FFN,
    MLP,
    ConvNorm,
    ConvNormAct,
    LayerNorm,
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    ShapeSpec,
    get_sine_pos_embed,
)
from detrex.modeling import ChannelMapper
from detrex.utils import get_rank, get_world_size, interpolate, inverse_sigmoid
from recorded_cases import close
from torch import nn

SINE = [
    "pos_sine_default_unnormalised",
    "pos_sine_detr",
    "pos_sine_dab",
    "pos_sine_deformable",
    "pos_sine_dc5_t10",
    "pos_sine_detr_full_128",
    "pos_sine_scale_eps",
]
MAPPERS = {
    "channel_mapper_detr_like": {"norm_layer": nn.GroupNorm(4, 8)},
    "channel_mapper_k3_extra2": {},
    "channel_mapper_relu_no_bias": {"norm_layer": nn.GroupNorm(2, 8), "activation": nn.ReLU()},
    "channel_mapper_default_outs": {},
}


def test_mlp_matches_the_recorded_one(layer_cases):
    layer_cases.check_module("mlp", MLP(**layer_cases.facts["mlp"]["constructor"]))


@pytest.mark.parametrize(
    "case", ["ffn_relu", "ffn_prelu", "ffn_no_identity", "ffn_out_dim_3fc", "ffn_identity_given"]
)
def test_ffn_matches_the_recorded_one(layer_cases, case):
    kwargs = dict(layer_cases.facts[case]["constructor"])
    if "activation" in kwargs:
        assert kwargs["activation"] == "PReLU()"
        kwargs["activation"] = nn.PReLU()
    layer_cases.check_module(case, FFN(**kwargs))


@pytest.mark.parametrize("channel_last", [True, False])
def test_layer_norm_matches_the_recorded_one(layer_cases, channel_last):
    case = f"layer_norm_channel_last_{channel_last}"
    layer_cases.check_module(case, LayerNorm(6, channel_last=channel_last))


def test_conv_norm_act_matches_the_recorded_one(layer_cases):
    kwargs = {"kernel_size": 3, "stride": 2, "padding": 1, "norm_layer": nn.GroupNorm(2, 4)}
    module = ConvNormAct(3, 4, activation=nn.ReLU(), **kwargs)
    layer_cases.check_module("conv_norm_act", module)
    assert ConvNorm(3, 4, **kwargs).activation is None


@pytest.mark.parametrize("case", SINE)
def test_sine_embedding_matches_the_recorded_one(layer_cases, case):
    module = PositionEmbeddingSine(**layer_cases.facts[case]["constructor"])
    mask = layer_cases.arrays(case, "in")["mask"]
    close(module(mask), layer_cases.arrays(case, "out")["out"])


def test_learned_embedding_matches_the_recorded_one(layer_cases):
    module = PositionEmbeddingLearned(**layer_cases.facts["pos_learned"]["constructor"])
    assert list(module.state_dict()) == layer_cases.facts["pos_learned"]["state_dict_keys"]
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert weights.min() >= 0
    assert weights.max() < 1
    module.load_state_dict(layer_cases.arrays("pos_learned", "param"))
    mask = layer_cases.arrays("pos_learned", "in")["mask"]
    close(module(mask), layer_cases.arrays("pos_learned", "out")["out"])


def test_embedding_of_points_matches_the_recorded_ones(layer_cases):
    for case in layer_cases.names("sine_embed_"):
        points = layer_cases.arrays(case, "in")["pos_tensor"]
        features = get_sine_pos_embed(points, **layer_cases.facts[case]["arguments"])
        close(features, layer_cases.arrays(case, "out")["out"])


def test_embedding_of_points_by_its_formula():
    x, y = 0.3, 0.8
    features = get_sine_pos_embed(torch.tensor([[[x, y]]]), num_pos_feats=4, temperature=100)
    angles = [2 * math.pi * c / 100 ** (2 * i / 4) for c in (y, x) for i in (0, 1)]
    expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
    assert features.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", list(MAPPERS))
def test_channel_mapper_matches_the_recorded_one(layer_cases, case):
    facts = layer_cases.facts[case]
    kwargs = {**facts["constructor"], **MAPPERS[case]}
    kwargs["input_shapes"] = {k: ShapeSpec(channels=c) for k, c in kwargs["input_shapes"].items()}
    mapper = ChannelMapper(**kwargs)
    mapper.load_state_dict(layer_cases.arrays(case, "param"))
    assert list(mapper.state_dict()) == facts["state_dict_keys"]
    inputs = layer_cases.arrays(case, "in")
    outputs = mapper(inputs)
    expected = layer_cases.arrays(case, "out")
    assert type(outputs).__name__ == facts["output_type"]
    assert len(outputs) == len(expected)
    for level, output in enumerate(outputs):
        close(output, expected[f"level{level}"])
    with pytest.raises(AssertionError):
        mapper({"res3": inputs["res3"]})


def test_inverse_sigmoid_matches_the_recorded_values(layer_cases):
    x = layer_cases.arrays("inverse_sigmoid", "in")["x"]
    expected = layer_cases.arrays("inverse_sigmoid", "out")
    close(inverse_sigmoid(x), expected["default"])
    close(inverse_sigmoid(x, eps=1e-5), expected["eps_1e_5"])
    logits = torch.linspace(-6, 6, 25)
    close(inverse_sigmoid(logits.sigmoid()), logits, atol=1e-4)


def test_interpolate_and_single_process():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert interpolate(x, size=(4, 4))[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True).shape[-1] == 4
    assert (get_world_size(), get_rank()) == (1, 0)
