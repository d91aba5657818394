import warnings

import pytest
import torch
from detrex.layers import (
    FFN,
    BaseTransformerLayer,
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    LayerNorm,
    MultiheadAttention,
    TransformerLayerSequence,
)
from recorded_cases import close, embedded_only
from torch import nn

ATTENTION = [
    ("mha_cross_batch_first_False", MultiheadAttention),
    ("mha_cross_batch_first_True", MultiheadAttention),
    ("mha_self_defaults", MultiheadAttention),
    ("mha_identity_float_mask", MultiheadAttention),
    ("cond_self_none", ConditionalSelfAttention),
    ("cond_self_bool", ConditionalSelfAttention),
    ("cond_self_float", ConditionalSelfAttention),
    ("cond_self_kpm", ConditionalSelfAttention),
    ("cond_self_key_value_given", ConditionalSelfAttention),
    ("cond_cross_first_True_kpm_False", ConditionalCrossAttention),
    ("cond_cross_first_True_kpm_True", ConditionalCrossAttention),
    ("cond_cross_first_False_kpm_False", ConditionalCrossAttention),
    ("cond_cross_first_False_kpm_True", ConditionalCrossAttention),
]
ORDERS = {
    "base_layer_post_norm": ("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
    "base_layer_pre_norm": ("norm", "self_attn", "norm", "cross_attn", "norm", "ffn"),
    "base_layer_encoder": ("self_attn", "norm", "ffn", "norm"),
}


@pytest.mark.parametrize(("case", "cls"), ATTENTION)
@pytest.mark.filterwarnings("ignore:.*(osition encoding|key_pos is missing).*")
def test_attention_matches_the_recorded_outputs_and_gradients(layer_cases, case, cls):
    layer_cases.check_module(case, cls(**layer_cases.facts[case]["constructor"]))


@pytest.mark.parametrize("case", list(ORDERS))
def test_transformer_layers_match_the_recorded_outputs_and_gradients(layer_cases, case):
    order = ORDERS[case]
    assert list(order) == layer_cases.facts[case]["constructor"]["operation_order"]
    attentions = [MultiheadAttention(32, 4) for _ in range(sum("attn" in name for name in order))]
    layer = BaseTransformerLayer(attentions, FFN(32, 20), nn.LayerNorm(32), order)
    layer_cases.check_module(case, layer)


def test_recorded_attention_errors(layer_cases):
    facts = layer_cases.facts["cond_attention_errors"]["facts"]
    query, memory = torch.randn(2, 7, 8), torch.randn(2, 11, 8)

    def batch_first_self():
        ConditionalSelfAttention(8, 2, batch_first=True)(query, query_pos=query)

    def batch_first_cross():
        layer = ConditionalCrossAttention(8, 2, batch_first=True)
        layer(query, memory, memory, None, query, memory, query_sine_embed=query)

    def no_position():
        ConditionalSelfAttention(8, 2)(query)

    for fact, function in {
        "self: batch_first=True with batch != length": batch_first_self,
        "cross: batch_first=True with batch != length": batch_first_cross,
        "self: no query_pos": no_position,
    }.items():
        with pytest.raises(getattr(__import__("builtins"), facts[fact])):
            function()


@pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask.*")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masked_keys_have_no_influence(dtype):
    """Both masks at once: the result is that of attention without the masked keys."""
    cross = ConditionalCrossAttention(8, 2).eval()
    q, sine = torch.randn(2, 3, 1, 8)
    memory, pos = torch.randn(2, 6, 1, 8)
    blocked = torch.tensor([False, True, False, False, False, False]).expand(3, -1)
    if dtype != torch.bool:
        blocked = torch.zeros(3, 6).masked_fill(blocked, -torch.inf)
    padding = torch.tensor([[False, False, False, False, True, True]])
    keep = [0, 2, 3]
    out = cross(q, memory, memory, None, q, pos, sine, True, blocked, padding)
    close(out, cross(q, memory[keep], memory[keep], None, q, pos[keep], sine, True))


def test_dropout_acts_in_training_only():
    layer = ConditionalSelfAttention(8, 2, attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(5, 2, 8)
    assert not torch.equal(layer(x, query_pos=x), layer(x, query_pos=x))
    layer.eval()
    assert torch.equal(layer(x, query_pos=x), layer(x, query_pos=x))


@pytest.mark.parametrize("cls", [MultiheadAttention, ConditionalSelfAttention])
def test_attention_under_autocast(cls):
    layer, x = cls(16, 2), torch.randn(6, 2, 16)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, -1] = True
    expected = layer(x, query_pos=x, key_padding_mask=padding)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, query_pos=x, key_padding_mask=padding)
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_missing_key_position_is_worth_a_warning():
    layer = MultiheadAttention(8, 2)
    query, memory = torch.randn(3, 1, 8), torch.randn(5, 1, 8)
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        layer(query, memory, memory, query_pos=query)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(query, memory, memory, query_pos=query, key_pos=memory)


def test_transformer_layer_copies_its_parts_and_takes_one_or_several_masks():
    order = ("self_attn", "norm", "ffn", "norm")
    layer = BaseTransformerLayer(MultiheadAttention(8, 2), FFN(8, 16), LayerNorm(8), order).eval()
    assert layer.embed_dim == 8
    assert layer.norms[0].weight is not layer.norms[1].weight
    x, mask = torch.randn(4, 2, 8), torch.eye(4, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(layer(x, attn_masks=mask), layer(x, attn_masks=[mask]))
    with pytest.raises(AssertionError):
        layer(x, attn_masks=[mask, mask])
    for attn, wrong_order in [
        ([MultiheadAttention(8, 2)] * 2, order),
        (MultiheadAttention(8, 2), ("self_attn", "pool")),
    ]:
        with pytest.raises(AssertionError):
            BaseTransformerLayer(attn, FFN(8, 16), LayerNorm(8), wrong_order)


def test_layer_sequence_copies_one_layer():
    sequence = TransformerLayerSequence(nn.Linear(2, 2), 3)
    assert len(sequence.layers) == sequence.num_layers == 3
    assert sequence.layers[0].weight is not sequence.layers[1].weight
    with pytest.raises(NotImplementedError):
        sequence()
    with pytest.raises(AssertionError):
        TransformerLayerSequence([nn.Linear(2, 2)], 3)


@embedded_only
def test_layer_sequence_keeps_a_list_of_layers():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    assert list(TransformerLayerSequence(layers, 2).layers) == layers
